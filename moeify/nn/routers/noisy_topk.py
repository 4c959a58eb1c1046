"""The first sparsely gated mixture of experts: noise before the choice spreads the load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.nn.routers.choose import highest, like, repeated_normal, softmax
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class NoisyTopK(RouterSpec):
    """Noise of a learned size is added to the logits in training; softmax over the k highest."""

    name: ClassVar[str] = "noisy-topk"

    init_std: float = 0.0

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")

    @property
    def gates_sum_to_one(self) -> bool:
        return True

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return NoisyTopKRouter(self, d_model, num_experts, top_k, dtype)


class NoisyTopKRouter(Router):
    """``H = W_g x + eps * softplus(W_n x)``, eps ~ N(0, 1) in training and 0 otherwise; ``g =
    softmax(KeepTopK(H, k))``.

    W_g is ``weight`` [E, D], W_n is ``noise_weight`` [E, D]. Both start at zero, as in the paper (Shazeer et
    al., arXiv 1701.06538, appendix A): in training the noise, of deviation log 2 at the start, chooses evenly
    at random; in evaluation all scores are equal until W_g has learned, and the first k experts are chosen. So
    the shards of a granular copy are chosen together in evaluation; the noise of training parts them, because
    it is drawn for each expert. ``init-std`` draws W_g instead.
    """

    def __init__(self, spec: NoisyTopK, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.num_experts, self.top_k = spec, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, dtype=dtype))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, d_model, dtype=dtype))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        shape = (self.num_experts, self.weight.shape[1])
        with torch.no_grad():
            self.weight.copy_(repeated_normal(shape, self.spec.init_std, generator, repeat, self.weight))
            self.noise_weight.zero_()

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        clean_TE = F.linear(x_TD, self.weight)
        deviation_TE = F.softplus(F.linear(x_TD, self.noise_weight))
        noise_TE = torch.ops.moeify.normal_like(clean_TE, self.training)
        logits_TE = clean_TE + noise_TE * deviation_TE
        values_TK, experts_TK = highest(logits_TE, self.top_k)
        weights_TK = like(softmax(values_TK), x_TD)
        if self.observer is not None:
            self.observe(
                logits=logits_TE, probabilities=softmax(logits_TE), experts=experts_TK, weights=weights_TK,
                clean=clean_TE, deviation=deviation_TE,
            )  # fmt: skip
        return experts_TK, weights_TK
