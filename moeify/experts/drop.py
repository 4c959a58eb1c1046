"""Drop-Upcycling (arXiv 2502.19261)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.experts.copy import Copy, expert_name
from moeify.ir.block import Block
from moeify.ir.weights import generator_for


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

    def alter(self, experts: Tensor, block: Block, role: str, scale: float, seed: int) -> None:
        dropped = round(self.ratio * block.d_ff)
        if role == "down_bias" or not dropped:
            return
        # One name for all roles of the block: whichever is computed first, they agree on the units.
        units = generator_for(seed, f"{block.anchor}.experts.dropped_units")
        values = generator_for(seed, expert_name(block, role))
        for expert in experts:
            unit_major = expert.t() if role == "down" else expert
            chosen = torch.randperm(block.d_ff, generator=units)[:dropped].to(expert.device)
            old = unit_major[chosen].float()
            fresh = torch.randn(old.shape, generator=values).to(old.device)
            unit_major[chosen] = (fresh * old.std(correction=0) + old.mean()).to(expert.dtype)
