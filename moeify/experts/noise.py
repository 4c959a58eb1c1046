"""Copies that start a little apart (OLMoE arXiv 2409.02060, mergekit)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.experts.copy import Copy, expert_name
from moeify.ir.block import Block
from moeify.ir.weights import generator_for


@dataclass(frozen=True)
class Noise(Copy):
    """Copies with Gaussian noise of deviation ``std`` on a fraction of the entries of every matrix; biases
    stay equal."""

    name: ClassVar[str] = "noise"
    exact: ClassVar[bool] = False

    std: float = 0.01
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise BadOption(f"noise.std is {self.std}: it must be a finite number of at least 0")
        if not 0 <= self.fraction <= 1:
            raise BadOption(f"noise.fraction is {self.fraction}: it must be between 0 and 1")

    def alter(self, experts: Tensor, block: Block, role: str, scale: float, seed: int) -> None:
        if role.endswith("bias"):
            return
        generator = generator_for(seed, expert_name(block, role))
        for expert in experts:  # one at a time: the noise never costs more memory than one expert
            # The noise belongs to the weight, so the share of the routed part scales it too.
            noise = torch.randn(expert.shape, generator=generator).mul_(self.std * scale)
            noise.mul_(torch.rand(expert.shape, generator=generator) < self.fraction)
            expert.add_(noise.to(expert))
