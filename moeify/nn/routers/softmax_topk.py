"""The router of Mixtral: softmax, the k most probable experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.nn.routers.choose import like, scaled, softmax, softmax_of_highest
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class SoftmaxTopK(RouterSpec):
    """The k most probable experts, weighted by their probabilities (renormalised to sum to 1, or as they are).

    ``scale`` multiplies the weights, 0 leaves them. Experts that split a block start with weight 1 each from
    ``softmax-topk{renormalise=false,init-std=0,scale=E}``, E the number of experts: all p are 1 / E then.
    """

    name: ClassVar[str] = "softmax-topk"

    renormalise: bool = True
    init_std: float = 0.02
    scale: float = 0.0

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")
        self._check_at_least_zero("scale", hint="0 leaves the weights as they are")

    @property
    def gates_sum_to_one(self) -> bool:
        return self.renormalise and self.scale in (0, 1)

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return SoftmaxTopKRouter(self, d_model, num_experts, top_k, dtype)


class SoftmaxTopKRouter(LinearRouter):
    """``p = softmax(W x)``; ``S`` = top-k of p; ``g = p / sum over S of p``, or p; times ``scale``. W is ``weight`` [E,
    D].

    Shazeer et al., arXiv 1701.06538; Jiang et al. (Mixtral), arXiv 2401.04088.
    """

    def __init__(self, spec: SoftmaxTopK, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype)
        self.spec = spec

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        experts_TK, weights_TK = softmax_of_highest(logits_TE, self.top_k, self.spec.renormalise)
        weights_TK = like(scaled(weights_TK, self.spec.scale), x_TD)
        if self.observer is not None:
            self.observe(logits=logits_TE, probabilities=softmax(logits_TE), experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK
