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
