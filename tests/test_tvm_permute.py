"""permute, experts, grouped_linear and unpermute as operators of their own, against torch's."""

from __future__ import annotations

import pytest
import torch

from moeify.backends.tvm.cpu import reference
from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.families import Families
from moeify.errors import BadOption
from tests.tvm_kernels import ROLES, Block, Run, compiled, routing, small_tile

BOTH = pytest.mark.parametrize("families", [table(), reference.TABLE], ids=["fast", "reference"])
BLOCK = Block(5, 9, 13, 11, "silu", gated=True)
TOKENS = [0, 1, 2, 30]
WIDTH = 19


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permute_and_back(families: Families, dtype: torch.dtype) -> None:
    there = compiled(
        lambda emitter, x, experts: families("permute", emitter, x, experts, 5),
        [(("T", WIDTH), dtype), (("T", 2), torch.int64)],
    )
    back = compiled(
        lambda emitter, rows, order, weights: families("unpermute", emitter, rows, order, weights),
        [(("R", WIDTH), dtype), (("R",), torch.int64), (("T", 2), dtype)],
    )
    for tokens in TOKENS:
        x, (experts, weights) = torch.randn(tokens, WIDTH, dtype=dtype), routing(tokens, 4, 2)
        found = there(x, experts)
        want = torch.ops.moeify.permute(x, experts, 5)
        assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))
        (y,) = back(found[0], found[2], weights.to(dtype))
        torch.testing.assert_close(y, torch.ops.moeify.unpermute(*want[::2], weights.to(dtype)))


@BOTH
def test_experts_of_sorted_rows(families: Families) -> None:
    run = compiled(
        lambda emitter, rows, counts: families("experts", emitter, rows, counts, BLOCK.spec),
        [(("R", BLOCK.d_model), torch.float32), ((BLOCK.experts,), torch.int64)],
        BLOCK.weights(),
        small_tile(2, 8),
    )
    weights = BLOCK.weights()
    for counts in ([0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [3, 0, 9, 1, 0]):
        rows = torch.randn(sum(counts), BLOCK.d_model)
        (y,) = run(rows, torch.tensor(counts))
        want = torch.ops.moeify.experts(rows, torch.tensor(counts), *map(weights.get, ROLES), "silu")
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("biased", [False, True])
def test_grouped_linear(families: Families, biased: bool) -> None:
    source = {"weight": torch.randn(4, 11, 7), "bias": torch.randn(4, 11)}
    bias = "bias" if biased else None
    run = compiled(
        lambda emitter, rows, counts: families("grouped_linear", emitter, rows, counts, "weight", bias),
        [(("R", 7), torch.float32), ((4,), torch.int64)],
        source,
        small_tile(2, 8),
    )
    for counts in ([0, 0, 0, 0], [0, 1, 0, 0], [5, 0, 2, 4]):
        rows = torch.randn(sum(counts), 7)
        (y,) = run(rows, torch.tensor(counts))
        want = torch.ops.moeify.grouped_linear(
            rows, torch.tensor(counts), source["weight"], source["bias"] if biased else None
        )
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def in_float32() -> Run:
    return BLOCK.compiled(2, target=small_tile(2, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_half_are_computed_in_float32(in_float32: Run, dtype: torch.dtype) -> None:
    """Bit for bit the float32 results, rounded once."""
    half = compiled(
        lambda emitter, x, e, w: table()("dispatch_ffn", emitter, x, e, w, BLOCK.spec),
        [(("T", BLOCK.d_model), dtype), (("T", 2), torch.int64), (("T", 2), dtype)],
        BLOCK.weights(),
        small_tile(2, 8),
    )
    x, (experts, weights) = torch.randn(6, BLOCK.d_model).to(dtype), routing(6, 5, 2)
    (y,) = half(x, experts, weights.to(dtype))
    (want,) = in_float32(x.float(), experts, weights.to(dtype).float())
    assert torch.equal(y, want.to(dtype))


def test_other_types_are_left_to_others() -> None:
    for name, inputs in {"topk": [((3, 4), torch.int64)], "route": [((3, 4), torch.float64)]}.items():
        seen = []

        def emit(emitter, x, name=name, seen=seen):  # type: ignore[no-untyped-def]
            seen.append(table()(name, emitter, x, 2))
            return x

        compiled(emit, inputs)
        assert seen == [None]


def test_a_type_that_experts_cannot_be_stored_in() -> None:
    with pytest.raises(
        BadOption, match=r"^experts cannot be stored as torch\.int8\n  hint: choose one of torch\.float"
    ):
        table(torch.int8)
