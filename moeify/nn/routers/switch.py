"""The router of Switch Transformers: one expert per token, with a capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.ir.no_expert import without_expert
from moeify.nn.routers.capacity import capacity, rank
from moeify.nn.routers.choose import like
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class Switch(RouterSpec):
    """The most probable expert, weighted by its probability; tokens over an expert's capacity get nothing."""

    name: ClassVar[str] = "switch"

    capacity_factor: float = 1.25
    jitter: float = 0.01
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_at_least_zero("capacity_factor", hint="0 means that there is no limit")
        self._check_at_least_zero("init_std")
        if not 0 <= self.jitter <= 1:
            raise BadOption(f"switch.jitter is {self.jitter}: it must be between 0 and 1")

    @property
    def gates_sum_to_one(self) -> bool:
        return False

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        self._check_top_k(top_k, 1)
        return SwitchRouter(self, d_model, num_experts, dtype)


class SwitchRouter(LinearRouter):
    """``p = softmax(W (x * jitter))`` in float32 or better; ``S = argmax p``; ``g = p_S``, not renormalised. W
    is ``weight`` [E, D].

    Jitter is U(1 - e, 1 + e) in training, 1 otherwise. Of the tokens that choose one expert the first ceil(T /
    E * capacity_factor) go there and the others nowhere, so that the residual carries them; in training and
    evaluation alike. Fedus, Zoph, Shazeer, arXiv 2101.03961.
    """

    def __init__(self, spec: Switch, d_model: int, num_experts: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, 1, spec.init_std, dtype, precise=True)
        self.spec = spec

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        precise_TD = like(x_TD, self.weight)
        if self.spec.jitter:
            precise_TD = precise_TD * torch.ops.moeify.jitter_like(precise_TD, self.spec.jitter, self.training)
        logits_TE = self.logits(precise_TD)
        probability_TE = torch.softmax(logits_TE, dim=-1)
        chosen_T1 = probability_TE.argmax(dim=-1, keepdim=True)
        experts_T1, weights_T1 = chosen_T1, like(probability_TE.gather(1, chosen_T1), x_TD)
        if self.spec.capacity_factor:
            most = capacity(chosen_T1, self.spec.capacity_factor, self.num_experts)
            kept_T1 = (rank(chosen_T1.squeeze(1)) < most).unsqueeze(1)
            experts_T1, weights_T1 = without_expert(chosen_T1, weights_T1, kept_T1, self.num_experts)
        self.observe(logits=logits_TE, probabilities=probability_TE, experts=chosen_T1, weights=weights_T1)
        return experts_T1, weights_T1
