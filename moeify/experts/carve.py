"""Carving: what nearly every token uses is shared, the rest is clustered by who fires together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moeify.errors import BadOption
from moeify.experts.balanced import cluster
from moeify.experts.base import Material, Partition
from moeify.experts.markers import firing_markers, most
from moeify.experts.split import Parts, Split
from moeify.ir.block import Block


@dataclass(frozen=True)
class Carve(Split):
    """The hidden units of the highest firing rate are shared; the others are clustered by the tokens on which they
    fire.

    A unit fires on a token when ``|h_n|`` is among the token's largest (the profile's ``top``). Each unit that is not
    shared has a column of markers over the profile's sample of tokens; clusters of equal size at the least total
    squared distance start from the columns of the highest firing rates and are refined as in balanced k-means. The
    unit nearest to its cluster's mean stands for the expert. CMoE, arXiv 2502.04416.
    """

    name: ClassVar[str] = "carve"
    needs_profile: ClassVar[bool] = True

    compensate: bool = True
    iterations: int = 30

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise BadOption(f"carve.iterations is {self.iterations}: it must be at least 1")

    def partition(self, block: Block, parts: Parts, material: Material, generator: torch.Generator) -> Partition:
        assert material.profile is not None
        shared_S, rest_M = most(material.profile.firing_F, parts.shared * parts.width)
        markers_MN = firing_markers(block, material, rest_M)
        # The rest comes highest rate first.
        return Partition(rest_M[cluster(markers_MN, markers_MN[: parts.experts], self.iterations)], shared_S)
