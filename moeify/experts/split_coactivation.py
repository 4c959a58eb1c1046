"""A split by who fires together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.experts.balanced import cluster, spread_seeds
from moeify.experts.base import Material, Partition
from moeify.experts.markers import firing_markers, most
from moeify.experts.split import Parts, Split
from moeify.ir.block import Block


@dataclass(frozen=True)
class SplitCoactivation(Split):
    """Balanced min-cut of the co-activation graph: hidden units that fire on the same tokens come together
    (MoEfication, arXiv 2110.01786).

    ``A_mn`` is the number of tokens of the profile's sample on which m and n both fire (see ``carve``). With parts of
    equal size, cutting the least of A and k-means on the units' markers have the same optimum, so balanced k-means
    gives the start. Then any two units of different experts whose exchange lowers the cut are exchanged, best first,
    until no exchange does or ``passes`` are over (Kernighan and Lin, An efficient heuristic procedure for
    partitioning graphs, 1970, without their look-ahead). Shared experts are the units of the highest firing rate. The
    unit that fires most often with its own expert stands for it.
    """

    name: ClassVar[str] = "split-coactivation"
    needs_profile: ClassVar[bool] = True

    compensate: bool = True
    iterations: int = 30
    passes: int = 4

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("passes", 0)):
            if getattr(self, name) < least:
                raise BadOption(f"split-coactivation.{name} is {getattr(self, name)}: it must be at least {least}")

    def partition(self, block: Block, parts: Parts, material: Material, generator: torch.Generator) -> Partition:
        assert material.profile is not None
        shared_S, rest_M = most(material.profile.firing_F, parts.shared * parts.width)
        markers_MN = firing_markers(block, material, rest_M)
        clusters_EW = cluster(markers_MN, spread_seeds(markers_MN, parts.experts, generator), self.iterations)
        exchange(markers_MN, clusters_EW, self.passes)
        return Partition(rest_M[_most_bound_first(markers_MN, clusters_EW)], shared_S)


def exchange(markers_MN: Tensor, clusters_EW: Tensor, passes: int) -> None:
    """Lower the cut by exchanging units, in place. Every number is a whole one, exact in float32."""
    for _ in range(passes):
        moves = [
            _exchange_pair(markers_MN, clusters_EW, a, b) for a, b in itertools.combinations(range(len(clusters_EW)), 2)
        ]
        if not any(moves):
            return


def _exchange_pair(markers_MN: Tensor, clusters_EW: Tensor, a: int, b: int) -> bool:
    """Exchange units of two clusters as long as that lowers the cut between them; the others' cuts do not change."""
    width = clusters_EW.shape[1]
    units = clusters_EW[[a, b]].flatten()
    markers = markers_MN[units]
    together = markers @ markers.t()
    together.fill_diagonal_(0)
    first, second = torch.arange(width), torch.arange(width, 2 * width)
    pull = together[:, first].sum(1) - together[:, second].sum(1)  # to the first cluster, less that to the second
    across = together[:width, width:].clone()
    moved = False
    while True:
        gain = torch.add(pull[second] - pull[first][:, None], across, alpha=-2)
        i, j = divmod(int(gain.argmax()), width)
        if gain[i, j] <= 0:
            break
        m, n = int(first[i]), int(second[j])
        pull += 2 * (together[n] - together[m])
        first[i], second[j] = n, m
        across[i], across[:, j] = together[n, second], together[first, m]
        moved = True
    clusters_EW[a], clusters_EW[b] = units[first], units[second]
    return moved


def _most_bound_first(markers_MN: Tensor, clusters_EW: Tensor) -> Tensor:
    ordered = []
    for units in clusters_EW:
        units = units.sort().values
        markers = markers_MN[units]
        bound = markers @ markers.sum(0) - markers.sum(1)  # firing together with the others of the expert
        ordered.append(units[torch.sort(bound, descending=True, stable=True).indices])
    return torch.stack(ordered)
