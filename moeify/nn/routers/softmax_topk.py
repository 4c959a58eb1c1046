"""The router of Mixtral: softmax, the k most probable experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.nn.routers.base import Router, RouterSpec
from moeify.nn.routers.choose import highest, like, repeated_normal, softmax


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


class SoftmaxTopKRouter(Router):
    """``p = softmax(W x)``; ``S`` = top-k of p; ``g = p / sum over S of p``, or p; times ``scale``. W is ``weight`` [E,
    D].

    Shazeer et al., arXiv 1701.06538; Jiang et al. (Mixtral), arXiv 2401.04088.
    """

    def __init__(self, spec: SoftmaxTopK, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.num_experts, self.top_k = spec, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, dtype=dtype))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        shape = (self.num_experts, self.weight.shape[1])
        with torch.no_grad():
            self.weight.copy_(repeated_normal(shape, self.spec.init_std, generator, repeat, self.weight))

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = F.linear(x_TD, self.weight)
        if self.spec.renormalise:
            # The softmax over the chosen logits is p / sum over S of p, without the division.
            values_TK, experts_TK = highest(logits_TE, self.top_k)
            weights_TK = softmax(values_TK)
        else:
            weights_TK, experts_TK = highest(softmax(logits_TE), self.top_k)
        if self.spec.scale not in (0, 1):
            weights_TK = weights_TK * self.spec.scale
        return experts_TK, like(weights_TK, x_TD)
