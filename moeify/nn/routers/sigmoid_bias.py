"""The router of DeepSeek-V3: sigmoids, and a bias per expert that balances loads without a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption, BadRecipe
from moeify.nn.routers.choose import highest, like, places, scaled, wide
from moeify.nn.routers.linear import LinearRouter
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class SigmoidBias(RouterSpec):
    """The k experts of the highest sigmoid plus bias, weighted by the sigmoids alone, renormalised.

    After a training step the bias of an expert with more tokens than the mean goes down by ``gamma``, with fewer up.
    With ``groups`` > 1 experts stand in groups of consecutive ones, and a token chooses within the best ``top-groups``.
    ``scale`` multiplies the weights, 0 leaves them.
    """

    name: ClassVar[str] = "sigmoid-bias"

    init_std: float = 0.02
    scale: float = 0.0
    gamma: float = 0.001
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        for option in ("init_std", "gamma"):
            self._check_at_least_zero(option)
        self._check_at_least_zero("scale", hint="0 leaves the weights as they are")
        if not 1 <= self.top_groups <= self.groups:
            what = f"{self.name}.top-groups is {self.top_groups} and there are {self.groups} groups"
            raise BadOption(what, hint="it must be at least 1 and at most their number")

    @property
    def gates_sum_to_one(self) -> bool:
        return self.scale in (0, 1)

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        if num_experts % self.groups:
            raise BadRecipe(f"{num_experts} experts do not stand in {self.groups} equal groups")
        within = num_experts // self.groups * self.top_groups
        if top_k > within:
            raise BadRecipe(f"{self.top_groups} groups have {within} experts, and a token is to choose {top_k}")
        return SigmoidBiasRouter(self, d_model, num_experts, top_k, dtype)


class SigmoidBiasRouter(LinearRouter):
    """``s = sigmoid(W x)``; ``S`` = top-k of ``s + b``; ``g = s / sum over S of s``; times ``scale``.

    W is ``weight`` [E, D]; b is the buffer ``bias`` [E], float32 or better, zero at the start, which no gradient
    changes. A group counts as much as its two highest ``s + b``. DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """

    bias: Tensor

    def __init__(self, spec: SigmoidBias, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(d_model, num_experts, top_k, spec.init_std, dtype)
        self.spec = spec
        self.register_buffer("bias", torch.empty(num_experts, dtype=torch.promote_types(dtype, torch.float32)))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        if self.num_experts // self.spec.groups % repeat:
            raise BadRecipe(f"groups of {self.num_experts // self.spec.groups} experts cut copies of {repeat} shards")
        super().reset(generator, repeat)
        self.bias.zero_()

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_TE = self.logits(x_TD)
        sigmoid_TE = torch.sigmoid(wide(logits_TE))
        biased_TE = sigmoid_TE + self.bias
        if self.spec.top_groups < self.spec.groups:
            biased_TE = self._within_groups(biased_TE)
        _, experts_TK = highest(biased_TE, self.top_k)
        chosen_TK = sigmoid_TE.gather(1, experts_TK)
        # The smallest number keeps weights finite where every sigmoid is 0 in float32.
        total_T1 = chosen_TK.sum(1, keepdim=True).clamp_min(torch.finfo(chosen_TK.dtype).tiny)
        weights_TK = like(scaled(chosen_TK / total_T1, self.spec.scale), x_TD)
        self.observe(logits=logits_TE, probabilities=sigmoid_TE, experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK

    def _within_groups(self, score_TE: Tensor) -> Tensor:
        """The scores of the best groups, minus infinity elsewhere."""
        size = self.num_experts // self.spec.groups
        best_TGJ, _ = highest(score_TE.unflatten(1, (self.spec.groups, size)), min(size, 2))
        group_TG = best_TGJ.select(2, 0)
        if size > 1:  # ONNX Runtime gives the sum of no rows over an axis another shape
            group_TG = group_TG + best_TGJ.select(2, 1)
        group_E = torch.arange(self.num_experts, device=score_TE.device) // size
        place_TE = places(group_TG, dim=1).index_select(1, group_E)
        return score_TE.masked_fill(place_TE >= self.spec.top_groups, -torch.inf)

    def after_step(self, values: Mapping[str, Tensor], total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """``b_i += gamma`` where the load of expert i is below the mean, ``-= gamma`` where it is above."""
        load_E = total(torch.bincount(values["experts"].flatten(), minlength=self.num_experts).to(self.bias.dtype))
        with torch.no_grad():
            self.bias.add_(torch.sign(load_E.mean() - load_E), alpha=self.spec.gamma)
