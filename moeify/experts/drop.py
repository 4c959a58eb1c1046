"""Drop-Upcycling (arXiv 2502.19261)."""

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
class Drop(Copy):
    """Copies in each of which a random ``ratio`` of the hidden units is drawn anew.

    An expert's set of units is shared by gate, up and down: their rows of up and gate and columns of down are
    redrawn from N(mean, std) of the very entries they replace. The units' entries of the up and gate biases
    are redrawn likewise, from the mean and deviation of those bias entries; the down bias belongs to no unit
    and is copied.
    """

    name: ClassVar[str] = "drop"
    exact: ClassVar[bool] = False

    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise BadOption(f"drop.ratio is {self.ratio}: it must be between 0 and 1")

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
        scale = shares.routed if role in ("down", "down_bias") else 1.0
        d_ff, dropped = block.d_ff, round(self.ratio * block.d_ff)

        def compute(weight: Tensor) -> Tensor:
            experts = stack(weight, num_experts, scale)
            if role == "down_bias" or not dropped:
                return experts
            # One name for all roles of the block: whichever is computed first, they agree on the units.
            units = generator_for(seed, f"{block.anchor}.experts.dropped_units")
            values = generator_for(seed, name)
            for expert in experts:
                unit_major = expert.t() if role == "down" else expert
                chosen = torch.randperm(d_ff, generator=units)[:dropped].to(expert.device)
                old = unit_major[chosen].float()
                fresh = torch.randn(old.shape, generator=values).to(old.device)
                unit_major[chosen] = (fresh * old.std(correction=0) + old.mean()).to(expert.dtype)
            return experts

        return WeightRecipe(name, (num_experts, *ref.shape), (ref,), compute, dtype)
