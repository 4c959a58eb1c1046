"""The router of THOR: experts drawn at random, which learn to agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir.no_expert import without_expert
from moeify.nn.routers.choose import highest, places
from moeify.nn.routers.router import Router, RouterSpec

INFERENCE = ("fixed", "average")


@dataclass(frozen=True)
class Random(RouterSpec):
    """The same k experts for all tokens of a call, drawn anew for each call in training; nothing to learn.

    ``inference`` says what evaluation does: ``fixed``, always the first k, or the ``average`` of all experts.
    """

    name: ClassVar[str] = "random"

    inference: str = "fixed"

    def __post_init__(self) -> None:
        self._check_choice("inference", INFERENCE)

    @property
    def gates_sum_to_one(self) -> bool:
        return True

    def leaves_out(self, top_k: int, num_experts: int) -> bool:
        return self.inference == "fixed" and super().leaves_out(top_k, num_experts)

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return RandomRouter(self, num_experts, top_k)


class RandomRouter(Router):
    """``S`` a random set of k experts in training, one for the whole call; ``g = 1 / k``.

    Evaluation takes the first k, one draw being as good as another for experts that were drawn alike, or all of them
    with the weight 1 / E. Zuo et al. (THOR), arXiv 2110.04260, whose loss makes two draws agree.
    """

    def __init__(self, spec: Random, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.spec, self.num_experts, self.top_k = spec, num_experts, top_k

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        self.spec._check_no_shards(repeat)

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T, E = x_TD.shape[0], self.num_experts
        drawn_1E = torch.ops.moeify.uniform_like(torch.zeros(1, E, device=x_TD.device), self.training)
        if self.spec.inference == "fixed":
            experts_TK = highest(drawn_1E, self.top_k)[1].expand(T, self.top_k)
            weights_TK = torch.full_like(experts_TK, 1.0 / self.top_k, dtype=x_TD.dtype)
        else:
            experts_TK, weights_TK = self._all(drawn_1E, x_TD)
        self.observe(experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK

    def _all(self, drawn_1E: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """A slot for every expert in order, so that training and evaluation have one graph: the k of the highest draw
        are used where something was drawn, all where nothing was, that is, in evaluation.
        """
        shape = (x_TD.shape[0], self.num_experts)
        used_1E = torch.logical_or(places(drawn_1E, dim=1) < self.top_k, drawn_1E.sum() == 0)
        weights_TE = (used_1E.to(x_TD.dtype) / used_1E.sum()).expand(shape)
        experts_TE = torch.arange(self.num_experts, device=x_TD.device).expand(shape)
        return without_expert(experts_TE, weights_TE, used_1E.expand(shape), self.num_experts)
