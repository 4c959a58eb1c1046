"""A split at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moeify.experts.base import Material, Partition
from moeify.experts.split import Parts, Split
from moeify.ir.block import Block


@dataclass(frozen=True)
class SplitRandom(Split):
    """Every hidden unit goes to a random expert, shared ones included: the baseline of MoEfication (arXiv 2110.01786)
    and of LLaMA-MoE (arXiv 2406.16554).
    """

    name: ClassVar[str] = "split-random"

    def partition(self, block: Block, parts: Parts, material: Material, generator: torch.Generator) -> Partition:
        drawn = torch.randperm(block.d_ff, generator=generator)
        shared = parts.shared * parts.width
        return Partition(drawn[shared:].reshape(parts.experts, parts.width), drawn[:shared])
