"""Expert choice: experts choose tokens, so that all have the same number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.ir.no_expert import without_expert
from moeify.nn.routers.capacity import capacity
from moeify.nn.routers.choose import first, like, places
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import MixingSpec, Router


@dataclass(frozen=True)
class ExpertChoice(MixingSpec):
    """Each expert takes the tokens that score it highest, the same number each; --top-k per token on average.

    A token may have all experts or none. What it has depends on the other tokens of the call, in evaluation too.
    """

    name: ClassVar[str] = "expert-choice"
    mixes_tokens: ClassVar[str] = "always"

    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")

    @property
    def gates_sum_to_one(self) -> bool:
        return False

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return ExpertChoiceRouter(self, d_model, num_experts, top_k, dtype)


class ExpertChoiceRouter(LinearRouter):
    """``p = softmax(W x)`` over the experts; each expert takes the ceil(T c / E) tokens of its largest p, the earlier
    among equals; ``g = p``. W is ``weight`` [E, D]; c is ``top_k``.

    A token has a slot for every expert, in order. Zhou et al., arXiv 2202.09368.
    """

    def __init__(self, spec: ExpertChoice, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype, precise=True)

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        probability_TE = torch.softmax(logits_TE, dim=-1)
        kept_TE = places(probability_TE, dim=0) < capacity(first(logits_TE, 1), float(self.top_k), self.num_experts)
        all_TE = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], self.num_experts)
        experts_TE, weights_TE = without_expert(all_TE, probability_TE, kept_TE, self.num_experts)
        weights_TE = like(weights_TE, x_TD)
        self.observe(logits=logits_TE, probabilities=probability_TE, experts=experts_TE, weights=weights_TE)
        return experts_TE, weights_TE
