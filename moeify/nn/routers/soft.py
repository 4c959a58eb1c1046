"""The first mixture of experts: all of them, weighted by a softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.nn.routers.choose import like, softmax
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class Soft(RouterSpec):
    """Every expert for every token, weighted by a softmax: nothing is sparse. Wants --top-k equal to --experts."""

    name: ClassVar[str] = "soft"

    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")

    @property
    def gates_sum_to_one(self) -> bool:
        return True

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        self._check_top_k(top_k, num_experts)
        return SoftRouter(self, d_model, num_experts, dtype)


class SoftRouter(LinearRouter):
    """``S`` = all experts in order; ``g = softmax(W x)``. W is ``weight`` [E, D].

    Jacobs, Jordan, Nowlan, Hinton, Adaptive mixtures of local experts, Neural Computation 3, 1991.
    """

    def __init__(self, spec: Soft, d_model: int, num_experts: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, num_experts, spec.init_std, dtype)

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        probability_TE = softmax(logits_TE)
        experts_TE = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], self.num_experts)
        weights_TE = like(probability_TE, x_TD)
        self.observe(logits=logits_TE, probabilities=probability_TE, experts=experts_TE, weights=weights_TE)
        return experts_TE, weights_TE
