"""The cosine router of Swin-MoE: how alike token and expert are, whatever their sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.errors import BadOption
from moeify.nn.routers.choose import like, repeated_normal, scaled, softmax, softmax_of_highest, wide
from moeify.nn.routers.router import Router, RouterSpec

_LEAST_TAU = 0.01  # as in the paper


@dataclass(frozen=True)
class Cosine(RouterSpec):
    """The k experts whose embeddings point most nearly where the projected token does, by a softmax over the cosines.

    Token and experts meet in a space of ``width`` dimensions. ``tau`` is the temperature at the start; it is learned,
    and never below 0.01. ``renormalise`` and ``scale`` are those of ``softmax-topk``.
    """

    name: ClassVar[str] = "cosine"

    width: int = 256
    tau: float = 0.5
    renormalise: bool = True
    init_std: float = 0.02
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise BadOption(f"cosine.width is {self.width}: it must be at least 1")
        if not _LEAST_TAU <= self.tau < math.inf:
            raise BadOption(f"cosine.tau is {self.tau}: it must be finite and at least {_LEAST_TAU}")
        self._check_positive("init_std")
        self._check_at_least_zero("scale", hint="0 leaves the weights as they are")

    @property
    def gates_sum_to_one(self) -> bool:
        return self.renormalise and self.scale in (0, 1)

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return CosineRouter(self, d_model, num_experts, top_k, dtype)


class CosineRouter(Router):
    """``z_i = cos(V x, w_i) / tau``; then as ``softmax-topk``. V is ``projection`` [P, D], w_i the rows of ``weight``
    [E, P], ``log_scale`` [1] the logarithm of 1 / tau.

    Cosines are computed in float32 or better. The projection starts as torch.nn.Linear does, uniform in +-1/sqrt(D).
    Hwang et al. (Tutel), arXiv 2206.03382, section 5.3 (Swin-MoE).
    """

    def __init__(self, spec: Cosine, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.num_experts, self.top_k = spec, num_experts, top_k
        self.projection = nn.Parameter(torch.empty(spec.width, d_model, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(num_experts, spec.width, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(1, dtype=torch.promote_types(dtype, torch.float32)))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        width, d_model = self.projection.shape
        with torch.no_grad():
            drawn = torch.rand(width, d_model, generator=generator).mul_(2).sub_(1).div_(math.sqrt(d_model))
            self.projection.copy_(drawn)
            shape = (self.num_experts, width)
            self.weight.copy_(repeated_normal(shape, self.spec.init_std, generator, repeat, self.weight))
            self.log_scale.fill_(-math.log(self.spec.tau))

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        token_TP = F.normalize(wide(F.linear(x_TD, self.projection)), dim=1)
        expert_EP = F.normalize(wide(self.weight), dim=1)
        scale = self.log_scale.clamp(max=-math.log(_LEAST_TAU)).exp()
        logits_TE = F.linear(token_TP, expert_EP) * scale
        experts_TK, weights_TK = softmax_of_highest(logits_TE, self.top_k, self.spec.renormalise)
        weights_TK = like(scaled(weights_TK, self.spec.scale), x_TD)
        if self.observer is not None:
            self.observe(logits=logits_TE, probabilities=softmax(logits_TE), experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK
