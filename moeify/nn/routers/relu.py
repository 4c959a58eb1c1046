"""The router of ReMoE: a ReLU decides how many experts a token has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.ir.no_expert import without_expert
from moeify.nn.routers.choose import highest, like, scaled
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class Relu(RouterSpec):
    """Every expert of a positive score, weighted by it, at most --top-k of them; differentiable without a softmax.

    How many a token has is learned: use --top-k equal to --experts, and a loss on the weights to keep them few.
    ``scale`` multiplies the weights, 0 leaves them.
    """

    name: ClassVar[str] = "relu"

    init_std: float = 0.02
    scale: float = 0.0

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")
        self._check_at_least_zero("scale", hint="0 leaves the weights as they are")

    @property
    def gates_sum_to_one(self) -> bool:
        return False

    def gates_are_one(self, top_k: int) -> bool:
        return False

    def leaves_out(self, top_k: int, num_experts: int) -> bool:
        return True

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return ReluRouter(self, d_model, num_experts, top_k, dtype)


class ReluRouter(LinearRouter):
    """``g = relu(W x)``; ``S = {i: g_i > 0}``, the k highest of them; times ``scale``. W is ``weight`` [E, D].

    Wang, Zhu, Chen (ReMoE), arXiv 2412.14711. The values observed as ``probabilities`` are g, which an L1 loss needs.
    """

    def __init__(self, spec: Relu, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype)
        self.spec = spec

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        gate_TE = F.relu(logits_TE)
        gate_TK, experts_TK = highest(gate_TE, self.top_k)
        experts_TK, weights_TK = without_expert(experts_TK, gate_TK, gate_TK > 0, self.num_experts)
        weights_TK = like(scaled(weights_TK, self.spec.scale), x_TD)
        self.observe(logits=logits_TE, probabilities=gate_TE, experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK
