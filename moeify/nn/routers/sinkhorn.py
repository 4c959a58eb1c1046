"""The router of S-BASE: in training a choice by the balanced plan of optimal transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import BadOption
from moeify.nn.routers.choose import highest, like
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import MixingSpec, Router


@dataclass(frozen=True)
class Sinkhorn(MixingSpec):
    """The k experts that a balanced transport plan gives a token in training, the most probable ones otherwise.

    They are weighted by their probabilities as they are. ``epsilon`` is the weight of the plan's entropy,
    ``iterations`` how often its rows and columns are normalised.
    """

    name: ClassVar[str] = "sinkhorn"
    mixes_tokens: ClassVar[str] = "in training"

    epsilon: float = 1.0
    iterations: int = 30
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_positive("epsilon")
        self._check_at_least_zero("init_std")
        if self.iterations < 1:
            raise BadOption(f"sinkhorn.iterations is {self.iterations}: it must be at least 1")

    @property
    def gates_sum_to_one(self) -> bool:
        return False

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return SinkhornRouter(self, d_model, num_experts, top_k, dtype)


class SinkhornRouter(LinearRouter):
    """``Pi`` maximises ``<Pi, W x> + epsilon H(Pi)`` with rows that sum to 1 / T and columns to 1 / E; ``S`` = top-k of
    Pi in training, of W x otherwise; ``g = softmax(W x)``, not renormalised. W is ``weight`` [E, D], in float32 or
    better.

    Clark et al. (S-BASE), arXiv 2202.01169, appendix B.2. No gradient goes through the plan.
    """

    def __init__(self, spec: Sinkhorn, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype, precise=True)
        self.spec = spec

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        plan_TE = torch.ops.moeify.sinkhorn(logits_TE, self.spec.epsilon, self.spec.iterations, self.training)
        _, experts_TK = highest(plan_TE, self.top_k)
        probability_TE = torch.softmax(logits_TE, dim=-1)
        weights_TK = like(probability_TE.gather(1, experts_TK), x_TD)
        self.observe(logits=logits_TE, probabilities=probability_TE, experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK
