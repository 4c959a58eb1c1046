"""Routing by reinforcement learning: the choice is an action, and its reward the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.nn.routers.choose import highest, softmax
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class Rl(RouterSpec):
    """k experts drawn by their probabilities in training, the most probable ones in evaluation; equal weights.

    No gradient reaches it through the model: it learns from a reward (REINFORCE), against a baseline it learns too.
    """

    name: ClassVar[str] = "rl"

    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")

    @property
    def gates_sum_to_one(self) -> bool:
        return True

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return RlRouter(self, d_model, num_experts, top_k, dtype)


class RlRouter(LinearRouter):
    """``pi = softmax(W x)``; ``S`` is k experts drawn from pi one after another without putting back (the k highest of
    ``W x`` plus Gumbel noise: Kool et al., arXiv 1903.06059), in evaluation the top-k of pi; ``g = 1 / k``.

    W is ``weight`` [E, D]. The baseline ``v . x + c``, ``baseline_weight`` [1, D] and ``baseline_bias`` [1], zero at
    the start, is computed where it is observed; it sends no gradient to x. Rosenbaum et al., arXiv 1711.01239; RL-R of
    Clark et al., arXiv 2202.01169.
    """

    def __init__(self, spec: Rl, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype)
        self.baseline_weight = nn.Parameter(torch.empty(1, d_model, dtype=dtype))
        self.baseline_bias = nn.Parameter(torch.empty(1, dtype=dtype))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        super().reset(generator, repeat)
        with torch.no_grad():
            self.baseline_weight.zero_()
            self.baseline_bias.zero_()

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        noise_TE = torch.ops.moeify.gumbel_like(logits_TE, self.training)
        _, experts_TK = highest(logits_TE + noise_TE, self.top_k)
        weights_TK = torch.full_like(experts_TK, 1.0 / self.top_k, dtype=x_TD.dtype)
        if self.observer is not None:
            baseline_T = F.linear(x_TD.detach(), self.baseline_weight, self.baseline_bias).squeeze(1)
            self.observe(
                logits=logits_TE, probabilities=softmax(logits_TE), experts=experts_TK, weights=weights_TK,
                baseline=baseline_T,
            )  # fmt: skip
        return experts_TK, weights_TK
