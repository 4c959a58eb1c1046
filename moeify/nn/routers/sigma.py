"""The router of sigma-MoE: each expert by its own sigmoid, so that experts do not compete for weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.nn.routers.choose import highest, like, scaled, wide
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class Sigma(RouterSpec):
    """The k experts of the highest sigmoids, weighted by them: weights of a token do not compete.

    ``scale`` multiplies the weights, 0 leaves them. Experts that split a block start with weight 1 each from
    ``sigma{init-std=0,scale=2}``: every sigmoid is 1/2 then.
    """

    name: ClassVar[str] = "sigma"

    init_std: float = 0.02
    scale: float = 0.0

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")
        self._check_at_least_zero("scale", hint="0 leaves the weights as they are")

    @property
    def gates_sum_to_one(self) -> bool:
        return False

    def gates_are_one(self, top_k: int) -> bool:
        return self.init_std == 0 and self.scale == 2

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return SigmaRouter(self, d_model, num_experts, top_k, dtype)


class SigmaRouter(LinearRouter):
    """``s = sigmoid(W x)``; ``S`` = top-k of s; ``g = s``; times ``scale``. W is ``weight`` [E, D].

    Csordas, Irie, Schmidhuber, arXiv 2310.10837.
    """

    def __init__(self, spec: Sigma, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype)
        self.spec = spec

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        sigmoid_TE = torch.sigmoid(wide(logits_TE))
        weights_TK, experts_TK = highest(sigmoid_TE, self.top_k)
        weights_TK = like(scaled(weights_TK, self.spec.scale), x_TD)
        self.observe(logits=logits_TE, probabilities=sigmoid_TE, experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK
