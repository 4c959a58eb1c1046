"""bfloat16 and float16 programs through the whole conversion, in both forms: values, types, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeify
from moeify.verify.measure import relative_error

D, H = 16, 32

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export warns about itself


class Layer(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], gated: bool) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(D), act
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.gate = nn.Linear(D, H) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        hidden = self.act(self.up(u)) if self.gate is None else self.act(self.gate(u)) * self.up(u)
        return x + self.down(hidden)


class Model(nn.Module):
    """A named activation, a gated one computed in float32, one with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, D)
        self.layers = nn.ModuleList(
            [Layer(F.gelu, False), Layer(lambda u: F.silu(u.float()).to(u.dtype), True), Layer(nn.PReLU(), False)]
        )
        self.head = nn.Linear(D, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(40).view(4, 10)
GRANULAR = {"method": "granular", "experts": 6, "shared": 1, "router": "noisy-topk"}
HASH = {"router": "hash", "experts": 3, "shared": 2, "shared_gate": True}
CASES = [
    (torch.bfloat16, {}, "graph"),
    (torch.bfloat16, GRANULAR, "graph"),
    (torch.bfloat16, HASH, "module"),
    (torch.float16, {}, "module"),
    (torch.float16, GRANULAR, "graph"),
]


def models(dtype: torch.dtype) -> tuple[Model, Model]:
    """The same weights in half precision and in float64."""
    half = Model().to(dtype).eval()
    return half, copy.deepcopy(half).double()


@pytest.mark.parametrize(("dtype", "recipe", "form"), CASES)
def test_an_exact_conversion_adds_no_more_than_rounding(dtype: torch.dtype, recipe: dict, form: str) -> None:
    half, wide = models(dtype)
    with torch.no_grad():
        exact, dense = wide(IDS), half(IDS)
        sparse = moeify.convert(copy.deepcopy(half), inputs=(IDS,), form=form, **{"experts": 4, **recipe})
        y = sparse(IDS)
    report = sparse.moeify_report
    eps = torch.finfo(dtype).eps
    assert [block.activation for block in report.blocks] == ["gelu", "silu", "custom"]
    assert all(block.converted and block.exact for block in report.blocks)
    # In float32 arithmetic copies differ by its rounding alone; scaled weights were rounded once more, by eps / 2.
    assert report.max_relative_error < (eps if recipe.get("shared") else 1e-6)
    assert y.dtype == dtype
    # The dense model's own rounding is the yardstick: a block rounds six values on its way (norm, up, act, product,
    # down, sum), a mixture two or three more (gates, weighted sum, shared part).
    assert relative_error(y, exact) < 2 * max(relative_error(dense, exact), eps)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_types_and_gradients(form: str) -> None:
    half, _ = models(torch.bfloat16)
    sparse = moeify.convert(half, inputs=(IDS,), form=form, experts=4, shared=1, shared_gate=True)
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    sparse.train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(sparse(IDS).flatten(0, 1).float(), IDS.flatten() % 7))
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in sparse.parameters())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_no_tokens() -> None:
    half, _ = models(torch.bfloat16)
    sparse = moeify.convert(half, inputs=(IDS,), form="graph", experts=4)
    y = sparse(IDS[:0])
    assert (y.shape, y.dtype) == ((0, 10, 7), torch.bfloat16)
    y.sum().backward()
    assert not any(p.grad.any() for name, p in sparse.named_parameters() if ".experts." in name)


def test_blocks_left_dense_keep_their_type() -> None:
    half, wide = models(torch.bfloat16)
    with torch.no_grad():
        sparse = moeify.convert(half, inputs=(IDS,), form="graph", blocks="first:1", experts=4)
        y, exact, dense = sparse(IDS), wide(IDS), half(IDS)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) < 2 * relative_error(dense, exact)
