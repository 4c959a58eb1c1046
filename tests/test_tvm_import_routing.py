"""The choice of experts is given to the target as one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.backends.tvm.cpu import reference
from moeify.backends.tvm.families import Families
from tests.tvm_run import imported, running


class Chosen(nn.Module):
    def __init__(self, choose: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.choose = choose

    def forward(self, x: Tensor) -> Any:
        return self.choose(x)


def _first(x: Tensor, k: int) -> list[Tensor]:
    values, order = torch.sort(x, dim=-1, descending=True, stable=True)
    return [values[..., :k], order[..., :k]]


def _both(x: Tensor) -> list[Tensor]:
    scores = x.softmax(-1)
    return [*_first(scores, 2), scores]


CASES = {
    "top-k of scores": (lambda x: _first(x, 3), ["topk"]),
    "of their softmax": (lambda x: _first(x.softmax(-1), 2), ["route"]),
    "of a softmax that is read elsewhere": (_both, ["topk"]),
    "of tokens in sequences": (lambda x: _first(x.view(-1, 2, 4), 1), ["topk"]),
    "the whole order": (lambda x: list(torch.sort(x, dim=-1, descending=True, stable=True)), []),
    "two lengths": (lambda x: [_first(x, 1)[0], _first(x.neg(), 2)[0]], ["topk", "topk"]),
    "ascending": (lambda x: [torch.sort(x, dim=-1, stable=True)[1][:, :2]], []),
}


@pytest.mark.parametrize("case", CASES)
def test_route_and_topk(case):
    choose, expected = CASES[case]
    asked = []

    def spy(name: str) -> Any:
        def lower(*args: Any) -> Any:
            asked.append(name)
            return reference.TABLE(name, *args)

        return lower

    families = Families({name: spy(name) for name in ("route", "topk")})
    run = running(imported(Chosen(choose), torch.randn(6, 8), families=families))
    assert asked == expected
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).mul(2).round()  # with equal scores
    for result, value in zip(run(x), choose(x), strict=True):
        torch.testing.assert_close(result, value)
