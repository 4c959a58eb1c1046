"""The router of GShard: two experts per token, the second at random, both within a capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.ir.no_expert import without_expert
from moeify.nn.routers.capacity import capacity, rank
from moeify.nn.routers.choose import first, highest, like, softmax
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class GShard(RouterSpec):
    """The two most probable experts, weights renormalised; in training the second only as often as its weight is large.

    Tokens over an expert's capacity get nothing from it; 0 means that there is no limit.
    """

    name: ClassVar[str] = "gshard"

    capacity_factor: float = 1.25
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_at_least_zero("capacity_factor", hint="0 means that there is no limit")
        self._check_at_least_zero("init_std")

    @property
    def gates_sum_to_one(self) -> bool:
        return self.capacity_factor == 0

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        self._check_top_k(top_k, 2)
        return GShardRouter(self, d_model, num_experts, dtype)


class GShardRouter(LinearRouter):
    """``p = softmax(W x)`` in float32 or better; ``S`` = top-2 of p; ``g = p / sum over S of p``. W is ``weight`` [E,
    D].

    In training the second expert is kept with probability ``min(1, 2 g_2)``, in evaluation always. An expert takes
    the first ceil(2 T / E * capacity_factor) that come to it: first choices in the order of the tokens, then second
    ones. Weights of what is left out are 0 and the others stay as they are. Lepikhin et al., arXiv 2006.16668,
    algorithm 1.
    """

    def __init__(self, spec: GShard, d_model: int, num_experts: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, 2, spec.init_std, dtype, precise=True)
        self.spec = spec

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        values_T2, chosen_T2 = highest(logits_TE, 2)
        gate_T2 = softmax(values_T2)
        first_T1, second_T1 = first(gate_T2, 1), torch.ops.aten.slice.Tensor(gate_T2, 1, 1, 2)
        drawn_T1 = torch.ops.moeify.uniform_like(second_T1, self.training)
        kept_T2 = torch.cat([first_T1 > 0, drawn_T1 < 2 * second_T1], dim=1)
        experts_T2, weights_T2 = without_expert(chosen_T2, gate_T2, kept_T2, self.num_experts)
        if self.spec.capacity_factor:
            most = capacity(first_T1, 2 * self.spec.capacity_factor, self.num_experts)
            fits_2T = rank(experts_T2.t().reshape(-1)) < most
            fits_T2 = fits_2T.reshape(2, x_TD.shape[0]).t()
            experts_T2, weights_T2 = without_expert(experts_T2, weights_T2, fits_T2, self.num_experts)
        weights_T2 = like(weights_T2, x_TD)
        if self.observer is not None:
            self.observe(logits=logits_TE, probabilities=softmax(logits_TE), experts=chosen_T2, weights=weights_T2)
        return experts_T2, weights_T2
