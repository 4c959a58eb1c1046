"""The router of BASE layers: in training every expert gets its share of the tokens, by an optimal assignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.nn.routers.choose import like
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import MixingSpec, Router


@dataclass(frozen=True)
class Base(MixingSpec):
    """One expert per token, weighted by a sigmoid of its score; in training each gets the same number of tokens.

    The assignment has the largest sum of scores; it is solved exactly and on the CPU, for some thousand tokens a call.
    """

    name: ClassVar[str] = "base"
    mixes_tokens: ClassVar[str] = "in training"

    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")

    @property
    def gates_sum_to_one(self) -> bool:
        return False

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        self._check_top_k(top_k, 1)
        return BaseRouter(self, d_model, num_experts, dtype)


class BaseRouter(LinearRouter):
    """``a_t`` maximises ``sum_t x_t . w_{a_t}`` with ceil(T / E) tokens at most for each expert in training, and
    ``x_t . w_{a_t}`` in evaluation; ``g = sigmoid(x . w_a)``. The w are the rows of ``weight`` [E, D], in float32 or
    better.

    Lewis et al., arXiv 2103.16716. The paper's experts have a residual branch inside, so that ``g FFN(h) + (1 - g) h``
    is ``h + g f(h)``; here the branch is the model's own around the block.
    """

    def __init__(self, spec: Base, d_model: int, num_experts: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, 1, spec.init_std, dtype, precise=True)

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        experts_T1 = torch.ops.moeify.balanced_assignment(logits_TE, self.training).unsqueeze(1)
        sigmoid_TE = torch.sigmoid(logits_TE)
        weights_T1 = like(sigmoid_TE.gather(1, experts_T1), x_TD)
        self.observe(logits=logits_TE, probabilities=sigmoid_TE, experts=experts_T1, weights=weights_T1)
        return experts_T1, weights_T1
