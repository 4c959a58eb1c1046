"""What no one wrote by hand: scheduled, it computes what Relax's operator does, in threads and vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tvm import relax, tirx

from moeify.backends.tvm.cpu import schedules
from moeify.backends.tvm.cpu.pipeline import to_kernels
from tests.tvm_dense import compiled, module, sizes, this_machine

op = relax.op
CASES: dict[str, tuple[Callable[..., Any], Callable[..., torch.Tensor]]] = {
    "chain": (lambda e, x: e.emit(op.tanh(e.emit(op.add(x, x)))), lambda x: torch.tanh(x + x)),
    "transpose": (lambda e, x: e.emit(op.permute_dims(x, [0, 2, 1, 3])), lambda x: x.transpose(1, 2)),
    "turned": (lambda e, x: e.emit(op.permute_dims(x)), lambda x: x.permute(3, 2, 1, 0)),
    "sum over the last axis": (lambda e, x: e.emit(op.sum(x, -1)), lambda x: x.sum(-1)),
    "sum over another": (lambda e, x: e.emit(op.sum(x, 1)), lambda x: x.sum(1)),
    "sum over all": (lambda e, x: e.emit(op.sum(x)), lambda x: x.sum()),
    "max and keep": (lambda e, x: e.emit(op.max(x, 2, keepdims=True)), lambda x: x.amax(2, keepdim=True)),
    "mean of squares": (lambda e, x: e.emit(op.mean(e.emit(op.multiply(x, x)), -1)), lambda x: (x * x).mean(-1)),
    "variance": (lambda e, x: e.emit(op.variance(x, [-1])), lambda x: x.var(-1, correction=0)),
    "two halves": (
        lambda e, x: e.emit(op.concat([e.emit(op.negative(x)), x], -1)),
        lambda x: torch.cat((-x, x), -1),
    ),
    "argmax": (lambda e, x: e.emit(op.argmax(x, -1)), lambda x: x.argmax(-1)),
}
SHAPES = {"known": (2, 5, 7, 32), "odd": (2, 5, 7, 9), "batch": ("b", 5, 7, 32), "last": (2, 5, 7, "s")}


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("case", list(CASES))
def test_scheduled_functions_compute_the_same(case: str, shape: str) -> None:
    emit, expected = CASES[case]
    b, s = sizes("bs")
    run = compiled(emit, [(tuple({"b": b, "s": s}.get(n, n) for n in SHAPES[shape]), "float32")])
    x = torch.randn([{"b": 2, "s": 9}.get(n, n) for n in SHAPES[shape]])
    # Wider than the default: sums of up to 2240 terms, one after the other here and by halves in torch.
    torch.testing.assert_close(run(x), expected(x), check_dtype=case != "argmax", rtol=1e-5, atol=1e-4)


FUNCTIONS: dict[str, tuple[Any, Callable[[torch.Tensor], torch.Tensor]]] = {
    "exp": (op.exp, torch.exp),
    "log": (op.log, torch.log),
    "tanh": (op.tanh, torch.tanh),
    "erf": (op.erf, torch.erf),
    "sigmoid": (op.sigmoid, torch.sigmoid),
    "gelu": (op.nn.gelu, F.gelu),
    "gelu_tanh": (op.nn.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (op.nn.silu, F.silu),
}


def test_functions_in_vectors_equal_torch() -> None:
    """All in one library: what differs is the kernel."""
    (t,) = sizes("t")

    def every(e: Any, x: Any) -> Any:
        return e.emit(op.concat([e.emit(function(x)) for function, _ in FUNCTIONS.values()], 0))

    run = compiled(every, [((t, 32), "float32")])
    x = torch.randn(7, 32) * 4
    found = run(x).split(7)
    for (name, (_, expected)), part in zip(FUNCTIONS.items(), found, strict=True):
        torch.testing.assert_close(part, expected(x), equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def test_functions_call_no_library() -> None:
    import tvm

    from moeify.backends.tvm.cpu import pipeline

    (t,) = sizes("t")
    mod, _ = module(lambda e, x: e.emit(op.exp(e.emit(op.tanh(x)))), [((t, 32), "float32")])
    library = pipeline.compile(mod, this_machine()).mod.imports[0]
    assert isinstance(library, tvm.runtime.Module)
    text = library.inspect_source("ll")
    assert "llvm.exp" not in text
    assert "@expf" not in text
    assert "@tanhf" not in text


def only_kernel(mod: Any) -> tirx.PrimFunc:
    found = schedules.schedule(to_kernels(mod, this_machine())).functions.values()
    (kernel,) = [function for function in found if isinstance(function, tirx.PrimFunc)]
    return kernel


def test_threads_and_vectors() -> None:
    (b,) = sizes("b")
    mod, _ = module(lambda e, x: e.emit(op.add(x, x)), [((b, 64, 64), "float32")])
    kernel = only_kernel(mod)
    assert "T.parallel(" in kernel.script()
    assert "T.vectorized(T.int64(16))" in kernel.script()


def test_small_kernels_have_no_threads() -> None:
    mod, _ = module(lambda e, x: e.emit(op.add(x, x)), [((4, 16), "float32")])
    kernel = only_kernel(mod)
    assert "T.parallel(" not in kernel.script()
    assert "T.vectorized(T.int64(16))" in kernel.script()


def test_a_function_of_itself_at_two_places() -> None:
    """Its value is computed twice, within itself: what it names must have two names."""

    def emit(e: Any, x: Any) -> Any:
        y = e.emit(op.tanh(x))
        z = e.emit(op.add(e.emit(op.permute_dims(y)), y))
        return e.emit(op.tanh(e.emit(op.add(e.emit(op.tanh(z)), z))))

    x = torch.randn(8, 8)
    z = x.tanh() + x.tanh().T
    torch.testing.assert_close(compiled(emit, [((8, 8), "float32")])(x), torch.tanh(z.tanh() + z))


def test_a_function_whose_value_becomes_an_integer() -> None:
    """As the buckets of relative positions are found: a logarithm, cast, with limits and a selection."""
    (s,) = sizes("s")

    def emit(e: Any, x: Any) -> Any:
        distance = e.emit(op.astype(x, "float32"))
        scaled = e.emit(op.multiply(e.emit(op.log(distance)), relax.const(3.0, "float32")))
        bucket = e.emit(op.minimum(e.emit(op.astype(scaled, "int64")), relax.const(7, "int64")))
        small = e.emit(op.less(x, relax.const(4, "int64")))
        return e.emit(op.add(e.emit(op.where(small, x, bucket)), relax.const(1, "int64")))

    x = torch.arange(1, 31).reshape(1, 30)
    expected = torch.where(x < 4, x, (x.float().log() * 3.0).long().clamp(max=7)) + 1
    assert torch.equal(compiled(emit, [((1, s), "int64")])(x), expected)


@pytest.mark.parametrize("batch", [2, "b"])
def test_rows_repeated_after_the_first(batch: int | str) -> None:
    """Reads ``(row % 8 + 1) // 2``, beside ``row // 8``: TVM's own way to one dimension reads before the buffer."""
    b = sizes("b")[0] if batch == "b" else batch

    def emit(e: Any, x: Any) -> Any:
        first, rest = e.emit(op.strided_slice(x, [1], [0], [1])), e.emit(op.strided_slice(x, [1], [1], [4]))
        twice = e.emit(op.reshape(e.emit(op.repeat(rest, 2, 1)), (b, 6, 16)))
        both = e.emit(op.concat([first, e.emit(op.nn.pad(twice, [0, 0, 0, 1, 0, 0]))], 1))
        return e.emit(op.add(both, both))

    x = torch.randn(2, 4, 16)
    expected = torch.cat((x[:, :1], F.pad(x[:, 1:].repeat_interleave(2, 1), (0, 0, 0, 1))), 1) * 2
    torch.testing.assert_close(compiled(emit, [((b, 4, 16), "float32")])(x), expected)
