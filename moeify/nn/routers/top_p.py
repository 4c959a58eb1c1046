"""Top-p routing: as many experts as it takes to be sure enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.ir.no_expert import without_expert
from moeify.nn.routers.choose import highest, like, softmax
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec

WEIGHTS = ("share", "probability", "one")


@dataclass(frozen=True)
class TopP(RouterSpec):
    """The fewest most probable experts whose probabilities add up to ``p``, at most --top-k of them.

    ``weight`` is an expert's ``share`` of the probability of those chosen, its ``probability`` as it is, or ``one``
    (for experts that split a block).
    """

    name: ClassVar[str] = "top-p"

    p: float = 0.4
    weight: str = "share"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise BadOption(f"top-p.p is {self.p}: it must be above 0 and at most 1")
        self._check_choice("weight", WEIGHTS)
        self._check_at_least_zero("init_std")

    @property
    def gates_sum_to_one(self) -> bool:
        return self.weight == "share"

    def gates_are_one(self, top_k: int) -> bool:
        return self.weight == "one" or super().gates_are_one(top_k)

    def leaves_out(self, top_k: int, num_experts: int) -> bool:
        return True

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return TopPRouter(self, d_model, num_experts, top_k, dtype)


class TopPRouter(LinearRouter):
    """``p = softmax(W x)``; ``S`` the smallest set with ``sum over S of p >= P``, cut at K; ``g = p / sum over S of
    p``, or p, or 1. W is ``weight`` [E, D].

    Huang et al., arXiv 2403.07652, whose weights are p as it is.
    """

    def __init__(self, spec: TopP, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype)
        self.spec = spec

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        self.spec._check_no_shards(repeat)
        super().reset(generator, repeat)

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        probability_TE = softmax(logits_TE)
        chosen_TK, experts_TK = highest(probability_TE, self.top_k)
        # An expert is taken while those before it do not reach P; the first always.
        kept_TK = chosen_TK.cumsum(1) - chosen_TK < self.spec.p
        if self.spec.weight == "one":
            chosen_TK = torch.ones_like(chosen_TK)
        experts_TK, weights_TK = without_expert(experts_TK, chosen_TK, kept_TK, self.num_experts)
        if self.spec.weight == "share":
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        weights_TK = like(weights_TK, x_TD)
        self.observe(logits=logits_TE, probabilities=probability_TE, experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK
