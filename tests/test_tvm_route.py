"""The choice of experts on the CPU against torch: order of equal scores, NaN, infinities, any number of experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeify.backends.tvm.cpu import reference
from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.families import Families
from tests.tvm_kernels import Run, compiled

SIZES = [(1, 1), (8, 2), (17, 17), (40, 3)]
BOTH = pytest.mark.parametrize("families", [table(), reference.TABLE], ids=["fast", "reference"])


def scores(tokens: int, experts: int) -> Tensor:
    """Many equal ones."""
    return torch.randint(-3, 4, (tokens, experts), generator=torch.Generator().manual_seed(0)).float() / 2


def chooser(name: str, families: Families, experts: int, k: int, dtype: torch.dtype = torch.float32) -> Run:
    return compiled(lambda emitter, x: families(name, emitter, x, k), [(("T", experts), dtype)])


@BOTH
@pytest.mark.parametrize(("experts", "k"), SIZES)
def test_topk(families: Families, experts: int, k: int) -> None:
    run = chooser("topk", families, experts, k)
    inf, nan = float("inf"), float("nan")
    x = scores(30, experts)
    x[1] = nan
    x[2, 0], x[3, -1], x[4, experts // 2] = nan, inf, -inf
    x[5], x[6] = -inf, inf
    for rows in (x, x[:1], x[:0]):
        values, indices = run(rows)
        want, order = torch.sort(rows, dim=1, descending=True, stable=True)
        assert torch.equal(indices, order[:, :k])
        torch.testing.assert_close(values, want[:, :k], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_topk_of_other_types(dtype: torch.dtype) -> None:
    x = scores(9, 8).to(dtype)
    values, indices = chooser("topk", table(), 8, 2, dtype)(x)
    want, order = torch.sort(x, dim=1, descending=True, stable=True)
    assert torch.equal(indices, order[:, :2])
    assert torch.equal(values, want[:, :2])


@BOTH
@pytest.mark.parametrize(("experts", "k"), SIZES)
def test_route(families: Families, experts: int, k: int) -> None:
    run = chooser("route", families, experts, k)
    x = scores(40, experts) + torch.linspace(-90, 90, 40)[:, None]
    x[1, 0] = float("-inf") if experts > 1 else 0.0
    for rows in (x, x[:1], x[:0]):
        values, indices = run(rows)
        want, order = torch.sort(torch.softmax(rows, 1), dim=1, descending=True, stable=True)
        assert torch.equal(indices, order[:, :k])
        torch.testing.assert_close(values, want[:, :k])


@BOTH
def test_a_nan_makes_the_probabilities_of_its_token_nan(families: Families) -> None:
    x = scores(4, 8)
    x[1, 5], x[2, 0] = float("nan"), float("inf")
    values, indices = chooser("route", families, 8, 2)(x)
    assert values.isnan().all(1).tolist() == torch.softmax(x, 1).isnan().all(1).tolist() == [False, True, True, False]
    assert indices[1:3].tolist() == [[0, 1], [0, 1]]
