"""The router of Switch Transformers: one expert per token, with a capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.errors import BadOption, BadRecipe
from moeify.nn.routers.base import Router, RouterSpec
from moeify.nn.routers.choose import like, repeated_normal


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
        if top_k != 1:
            raise BadRecipe(f"the switch router chooses one expert per token, not {top_k}", hint="--top-k 1")
        return SwitchRouter(self, d_model, num_experts, dtype)


class SwitchRouter(Router):
    """``p = softmax(W (x * jitter))`` in float32 or better; ``S = argmax p``; ``g = p_S``, not renormalised. W
    is ``weight`` [E, D].

    Jitter is U(1 - e, 1 + e) in training, 1 otherwise. Of the tokens that choose one expert the first ceil(T /
    E * capacity_factor) keep their weight and the others get 0, so that the residual carries them; in training
    and evaluation alike. Fedus, Zoph, Shazeer, arXiv 2101.03961.
    """

    def __init__(self, spec: Switch, d_model: int, num_experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.num_experts, self.top_k = spec, num_experts, 1
        precise = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, dtype=precise))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        shape = (self.num_experts, self.weight.shape[1])
        with torch.no_grad():
            self.weight.copy_(repeated_normal(shape, self.spec.init_std, generator, repeat, self.weight))

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        precise_TD = like(x_TD, self.weight)
        if self.spec.jitter:
            precise_TD = precise_TD * torch.ops.moeify.jitter_like(precise_TD, self.spec.jitter, self.training)
        probability_TE = torch.softmax(F.linear(precise_TD, self.weight), dim=-1)
        experts_T1 = probability_TE.argmax(dim=-1, keepdim=True)
        weights_T1 = probability_TE.gather(1, experts_T1)
        if self.spec.capacity_factor:
            kept_T = self._rank(experts_T1.squeeze(1)) < self._capacity(experts_T1)
            weights_T1 = weights_T1 * kept_T.unsqueeze(1).to(weights_T1.dtype)
        return experts_T1, like(weights_T1, x_TD)

    def _capacity(self, experts_T1: Tensor) -> Tensor:
        """ceil(T / E * capacity_factor) as a tensor: T stays symbolic in an exported graph."""
        tokens = torch.ones_like(experts_T1, dtype=torch.float64).sum()
        return torch.ceil(tokens * self.spec.capacity_factor / self.num_experts)

    def _rank(self, experts_T: Tensor) -> Tensor:
        """How many earlier tokens chose the same expert.

        A stable sort by expert puts the tokens of one expert side by side in their order, so a token's rank is
        its place minus the place where its expert begins. The usual cumulative sum over an [T, E] mask costs E
        times the memory.
        """
        sorted_T, order_T = torch.sort(experts_T, stable=True)
        begin_T = torch.searchsorted(sorted_T, sorted_T)
        place_T = torch.ones_like(order_T).cumsum(0) - 1
        return torch.zeros_like(order_T).scatter(0, order_T, place_T - begin_T)
