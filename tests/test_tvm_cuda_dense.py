"""The CUDA target's dense operators compute what torch does: the same kernels, run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tvm import relax, tirx

from moeify.backends.tvm.cuda.table import table
from moeify.backends.tvm.emitter import dtype_of
from tests.tvm_cuda import module, on_cpu, relative

FLOAT = 2e-6  # sums in another order


def n(name: str) -> Any:
    return tirx.Var(name, "int64")


def test_linear_of_any_number_of_rows() -> None:
    weights = {"w": torch.randn(70, 33), "b": torch.randn(70)}
    shape = (n("batch"), n("seq"), 33)
    run = on_cpu(
        *module({"x": (shape, torch.float32)}, lambda e, x: table()("linear", e, x, "w", "b", "gelu"), weights)
    )
    for batch, seq in ((1, 1), (2, 35), (3, 64)):
        x = torch.randn(batch, seq, 33)
        assert relative(run(x), F.gelu(F.linear(x, weights["w"], weights["b"]))) < FLOAT


def test_linear_in_float16_sums_in_float32() -> None:
    weights = {"w": (torch.randn(130, 72) * 0.1).half()}
    run = on_cpu(
        *module({"x": ((n("t"), 72), torch.float16)}, lambda e, x: table()("linear", e, x, "w", None), weights)
    )
    x = torch.randn(65, 72).half()
    # one rounding to float16, of a sum whose own error is far below
    assert relative(run(x), F.linear(x.float(), weights["w"].float())) < 2**-11


@pytest.mark.parametrize(
    "shapes", [((3, 65, 20), (20, 70)), ((2, 3, 5, 20), (2, 3, 20, 70)), ((2, 3, 5, 7), (3, 7, 8))]
)
def test_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (torch.randn(shape) for shape in shapes)
    inputs = {"a": (a.shape, a.dtype), "b": (b.shape, b.dtype)}
    run = on_cpu(*module(inputs, lambda e, *xs: table()("matmul", e, *xs)))
    assert relative(run(a, b), a @ b) < FLOAT


def test_matmul_of_sizes_known_when_it_runs() -> None:
    shape = (n("b"), 2, *[n("s")] * 2)
    inputs = dict.fromkeys(("a", "b"), (shape, torch.float32))
    run = on_cpu(*module(inputs, lambda e, *xs: table()("matmul", e, *xs)))
    a, b = torch.randn(3, 2, 7, 7), torch.randn(3, 2, 7, 7)
    assert relative(run(a, b), a @ b) < FLOAT


@pytest.mark.parametrize("masking", ["none", "causal", "float", "bool"])
def test_attention(masking: str) -> None:
    B, S, L = n("b"), n("s"), n("l")
    sizes = {"q": (B, 4, S, 12), "k": (B, 2, L, 12), "v": (B, 2, L, 20)}
    inputs: dict[str, Any] = {name: (shape, torch.float32) for name, shape in sizes.items()}
    if masking == "float":
        inputs["mask"] = ((B, 1, S, L), torch.float32)
    if masking == "bool":
        inputs["mask"] = ((S, L), torch.bool)

    def emit(emitter: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return table()("attention", emitter, q, k, v, mask, masking == "causal", 0.3)

    run = on_cpu(*module(inputs, emit))
    for batch, rows, columns in ((1, 1, 1), (2, 9, 9), (2, 5, 66)):
        q = torch.randn(batch, 4, rows, 12)
        k, v = torch.randn(batch, 2, columns, 12), torch.randn(batch, 2, columns, 20)
        seen = torch.rand(rows, columns) > 0.3
        seen[-1] = rows == 1  # else a query that sees no key
        mask = {"float": torch.randn(batch, 1, rows, columns), "bool": seen}.get(masking)
        want = F.scaled_dot_product_attention(q, k, v, mask, 0.0, masking == "causal", scale=0.3, enable_gqa=True)
        assert relative(run(q, k, v, *([] if mask is None else [mask])), want) < FLOAT


def test_norms_and_softmax_far_from_zero() -> None:
    """A mean of 100 and a deviation of 1: the variance is taken from differences."""
    weights = {"g": torch.randn(48), "b": torch.randn(48)}

    def emit(emitter: Any, x: Any) -> Any:
        gain, shift, families = emitter.weights.plain("g"), emitter.weights.plain("b"), table()
        norms = [
            families("layer_norm", emitter, x, gain, shift, 1e-5),
            families("layer_norm", emitter, x, None, None, 1e-5),
            families("rms_norm", emitter, x, gain, 1e-6),
            families("softmax", emitter, x),
        ]
        return emitter.emit(relax.Tuple(norms))

    run = on_cpu(*module({"x": ((n("t"), 48), torch.float32)}, emit, weights))
    x = torch.randn(7, 48) + 100
    wide = x.double()
    gain, shift = weights["g"].double(), weights["b"].double()
    want = [
        F.layer_norm(wide, (48,), gain, shift, 1e-5),
        F.layer_norm(wide, (48,), None, None, 1e-5),
        F.rms_norm(wide, (48,), gain, 1e-6),
        wide.softmax(-1),
    ]
    # x is 100 with a spacing of 7.6e-6: the mean is known to half of that, of values of 1
    for got, exact in zip(run(x), want, strict=True):
        assert relative(got, exact) < 1e-5


def test_topk_orders_ties_and_nans_as_a_stable_sort() -> None:
    run = on_cpu(*module({"x": ((n("t"), 9), torch.float32)}, lambda e, x: table()("topk", e, x, 4)))
    x = torch.randint(0, 4, (40, 9)).float()
    x[3, 5] = x[4, 0] = x[4, 8] = float("nan")
    values, indices = run(x)
    want = torch.sort(x, dim=-1, descending=True, stable=True)
    assert torch.equal(indices, want.indices[:, :4])
    torch.testing.assert_close(values, want.values[:, :4], rtol=0, atol=0, equal_nan=True)


def test_route_chooses_among_probabilities() -> None:
    run = on_cpu(*module({"x": ((n("t"), 9), torch.float32)}, lambda e, x: table()("route", e, x, 2)))
    x = torch.randn(33, 9)
    values, indices = run(x)
    want = x.softmax(-1).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(indices, want.indices[:, :2])
    assert relative(values, want.values[:, :2]) < FLOAT


def test_other_types_are_left_to_tvm() -> None:
    found = []

    def emit(emitter: Any, a: Any, b: Any) -> Any:
        assert dtype_of(a) == "int64"
        found.extend([table()("matmul", emitter, a, b), table()("softmax", emitter, a), table()("topk", emitter, a, 1)])
        found.append(table()("route", emitter, a, 1))
        return a

    module({"a": ((3, 3), torch.int64), "b": ((3, 3), torch.int64)}, emit)
    assert found == [None] * 4
