"""Hierarchical gating: a choice of groups, then of experts within each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.errors import BadOption, BadRecipe
from moeify.nn.routers.choose import highest, like, repeated_normal, softmax
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class Hierarchical(RouterSpec):
    """The best ``top-groups`` of ``groups`` groups of consecutive experts, then the best experts within each of them.

    A weight is the product of the group's and the expert's own. Every chosen group gives --top-k / top-groups experts.
    With ``renormalise`` the weights at each level are over those chosen there; a level that chooses one has the weight
    1, and learns from losses alone.
    """

    name: ClassVar[str] = "hierarchical"

    groups: int = 2
    top_groups: int = 1
    renormalise: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")
        if not 1 <= self.top_groups <= self.groups:
            what = f"{self.name}.top-groups is {self.top_groups} and there are {self.groups} groups"
            raise BadOption(what, hint="it must be at least 1 and at most their number")

    @property
    def gates_sum_to_one(self) -> bool:
        return self.renormalise

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        if num_experts % self.groups:
            raise BadRecipe(f"{num_experts} experts do not stand in {self.groups} equal groups")
        size = num_experts // self.groups
        if top_k % self.top_groups or top_k // self.top_groups > size:
            raise BadRecipe(
                f"{self.top_groups} groups of {size} experts cannot give {top_k} experts, as many from each",
                hint=f"--top-k must be a multiple of {self.top_groups} and at most {self.top_groups * size}",
            )
        return HierarchicalRouter(self, d_model, num_experts, top_k, dtype)


class HierarchicalRouter(LinearRouter):
    """``g = g1_a(x) g2_{j given a}(x)`` for expert j of group a, ``g1 = softmax(KeepTopK(V x))`` over the A groups,
    ``g2 = softmax(KeepTopK(W_a x))`` over the E / A experts of group a; without ``renormalise`` the softmax is over
    all and KeepTopK after it.

    V is ``group_weight`` [A, D], W is ``weight`` [E, D], group a its rows a E / A to (a + 1) E / A. Jordan and Jacobs,
    Hierarchical mixtures of experts, Neural Computation 6, 1994; Shazeer et al., arXiv 1701.06538, appendix B, without
    its noise.
    """

    def __init__(self, spec: Hierarchical, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype)
        self.spec = spec
        self.group_weight = nn.Parameter(torch.empty(spec.groups, d_model, dtype=dtype))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        size, chosen = self.num_experts // self.spec.groups, self.top_k // self.spec.top_groups
        if size % repeat or chosen % repeat:
            raise BadRecipe(f"{chosen} of the {size} experts of a group cut copies of {repeat} shards")
        super().reset(generator, repeat)
        with torch.no_grad():
            shape = (self.spec.groups, self.weight.shape[1])
            self.group_weight.copy_(repeated_normal(shape, self.std, generator, 1, self.group_weight))

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        size = self.num_experts // self.spec.groups
        group_TA = F.linear(x_TD, self.group_weight)
        logits_TE = self.logits(x_TD)
        member_TAM = logits_TE.unflatten(1, (self.spec.groups, size))
        weight_TG, groups_TG = self._keep(group_TA, self.spec.top_groups)
        index_TGM = groups_TG.unsqueeze(2).expand(-1, -1, size)
        weight_TGJ, members_TGJ = self._keep(member_TAM.gather(1, index_TGM), self.top_k // self.spec.top_groups)
        experts_TK = (groups_TG.unsqueeze(2) * size + members_TGJ).flatten(1)
        weights_TK = like((weight_TG.unsqueeze(2) * weight_TGJ).flatten(1), x_TD)
        if self.observer is not None:
            both_TAM = softmax(group_TA).unsqueeze(2) * softmax(member_TAM)
            self.observe(logits=logits_TE, probabilities=both_TAM.flatten(1), experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK

    def _keep(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Weights and places of the highest along the last axis."""
        if self.spec.renormalise:
            values, places = highest(logits, count)
            return softmax(values), places
        return highest(softmax(logits), count)
