"""A split by likeness of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from moeify.errors import BadOption
from moeify.experts.balanced import cluster, spread_seeds
from moeify.experts.base import Material, Partition
from moeify.experts.markers import most
from moeify.experts.split import Parts, Split
from moeify.ir.block import Block
from moeify.ir.recipe import BlockRecipe


@dataclass(frozen=True)
class SplitKMeans(Split):
    """Balanced k-means on the rows of the gate projection (of up where there is no gate), scaled to length 1: the
    parameter clustering of MoEfication (arXiv 2110.01786).

    Needs no data, unless there are shared experts: they are the units of the highest firing rate then, as ``carve``
    has them. The unit nearest to its cluster's mean stands for the expert.
    """

    name: ClassVar[str] = "split-kmeans"

    iterations: int = 30

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise BadOption(f"split-kmeans.iterations is {self.iterations}: it must be at least 1")

    def wants_profile(self, recipe: BlockRecipe) -> bool:
        return recipe.shared > 0 or super().wants_profile(recipe)

    def partition(self, block: Block, parts: Parts, material: Material, generator: torch.Generator) -> Partition:
        shared_S, rest_M = torch.empty(0, dtype=torch.int64), torch.arange(block.d_ff)
        if parts.shared:
            assert material.profile is not None
            shared_S, rest_M = most(material.profile.firing_F, parts.shared * parts.width)
        ref = block.gate or block.up
        rows_MD = F.normalize(ref.read(material.read(ref.parameter)).detach().float().cpu()[rest_M], dim=1)
        seeds_ED = spread_seeds(rows_MD, parts.experts, generator)
        return Partition(rest_M[cluster(rows_MD, seeds_ED, self.iterations)], shared_S)
