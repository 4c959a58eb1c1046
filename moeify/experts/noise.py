"""Copies that start a little apart (OLMoE arXiv 2409.02060, mergekit)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.experts.copy import Copy, stack
from moeify.experts.shared import Shares
from moeify.ir.block import Block, WeightRef
from moeify.ir.weights import WeightRecipe, generator_for


@dataclass(frozen=True)
class Noise(Copy):
    """Copies with Gaussian noise of deviation ``std`` on a fraction of the entries of every matrix; biases
    stay equal."""

    name: ClassVar[str] = "noise"
    exact: ClassVar[bool] = False

    std: float = 0.01
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.std < 0:
            raise BadOption(f"noise.std is {self.std}: it must not be negative")
        if not 0 <= self.fraction <= 1:
            raise BadOption(f"noise.fraction is {self.fraction}: it must be between 0 and 1")

    def recipe(
        self,
        block: Block,
        role: str,
        ref: WeightRef,
        num_experts: int,
        shares: Shares,
        seed: int,
        dtype: torch.dtype,
    ) -> WeightRecipe:
        name = f"{block.anchor}.experts.{role}"
        # The noise belongs to the weight, so the share of the routed part scales it too.
        scale = shares.routed if role in ("down", "down_bias") else 1.0

        def compute(weight: Tensor) -> Tensor:
            experts = stack(weight, num_experts, scale)
            if role.endswith("bias"):
                return experts
            generator = generator_for(seed, name)
            for expert in experts:  # one at a time: the noise never costs more memory than one expert
                noise = torch.randn(ref.shape, generator=generator).mul_(self.std * scale)
                noise.mul_(torch.rand(ref.shape, generator=generator) < self.fraction)
                expert.add_(noise.to(expert))
            return experts

        return WeightRecipe(name, (num_experts, *ref.shape), (ref,), compute, dtype)
