"""A split by what the loss depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moeify.experts.base import Material, Partition
from moeify.experts.markers import most
from moeify.experts.split import Parts, Split
from moeify.ir.block import Block


@dataclass(frozen=True)
class SplitImportance(Split):
    """The most important hidden units are shared; the others are dealt out by rank, one to each expert in turn, so
    that all experts matter alike.

    The importance of unit n is the mean of ``|h_n dL/dh_n|``, the first-order change of the loss when the unit is
    taken out (LLaMA-MoE, arXiv 2406.16554, which draws the others at random). The most important unit stands for
    the expert.
    """

    name: ClassVar[str] = "split-importance"
    needs_profile: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True

    compensate: bool = True

    def partition(self, block: Block, parts: Parts, material: Material, generator: torch.Generator) -> Partition:
        assert material.profile is not None
        assert material.profile.importance_F is not None
        shared_S, rest_M = most(material.profile.importance_F, parts.shared * parts.width)
        return Partition(rest_M.reshape(parts.width, parts.experts).t().contiguous(), shared_S)
