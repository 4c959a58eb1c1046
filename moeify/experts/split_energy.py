"""A split by what the chosen experts capture of the output's energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import BadOption, Refused
from moeify.experts.balanced import assign
from moeify.experts.base import Material, Partition
from moeify.experts.markers import most
from moeify.experts.split import Parts, Split
from moeify.ir.block import Block
from moeify.ir.hidden import hidden

_ROWS = 512  # of hidden values at a time


@dataclass(frozen=True)
class SplitEnergy(Split):
    """The parts that capture the most energy, if every token gets the experts that hold the most of its own.

    This project's own method. The energy of hidden unit n on token t is ``q_tn = (h_n - mean h_n)^2 ||w_n||^2``, w_n
    its column of the down projection: the squared error of the block's output when this unit alone is off and counts
    with its mean. Every token's energies are divided by their sum, so that all tokens have one vote. Maximised is ::

        sum_t sum_n q_tn G[t, part(n)]

    where G[t, e] is 1 for the ``top_k`` experts of the largest summed energy on token t and for the shared part, else
    0. It starts with the units of the largest mean energy shared and the others dealt out by rank. Then, in turn, the
    tokens choose their experts, and the units go where they are captured most: a balanced assignment with score
    ``q^T G``. Neither can lower the sum (coordinate ascent, to a local maximum); it ends where nothing is gained, or
    after ``iterations``. The unit that is captured most stands for its expert.

    Energies of units add up where their outputs are orthogonal: the sum leaves out how outputs cancel. G is the best
    choice of experts, which a router only comes near.
    """

    name: ClassVar[str] = "split-energy"
    needs_profile: ClassVar[bool] = True

    compensate: bool = True
    iterations: int = 20

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise BadOption(f"split-energy.iterations is {self.iterations}: it must be at least 1")

    def partition(self, block: Block, parts: Parts, material: Material, generator: torch.Generator) -> Partition:
        energy_NF = unit_energy(block, material)
        part_F = ascend(energy_NF, parts, self.iterations)
        gates_NP, _ = choose(energy_NF, part_F, parts)
        captured_F = (energy_NF.t() @ gates_NP).gather(1, part_F[:, None])[:, 0]
        # Part by part; within a part what is captured most first, the lower number first among equals.
        order_F = torch.from_numpy(np.lexsort((-captured_F.numpy(), part_F.numpy())))
        routed = parts.experts * parts.width
        return Partition(order_F[:routed].reshape(parts.experts, parts.width), order_F[routed:])


def unit_energy(block: Block, material: Material) -> Tensor:
    """The energy of each hidden unit over the profile's sample of rows, [N, F], float32. A row sums to 1, or to 0 where
    every unit has its mean. Raises Refused for NaN.
    """
    assert material.profile is not None
    inputs_ND, mean_F = material.profile.inputs_ND, material.profile.mean_F
    square_F = block.down.read(material.read(block.down.parameter)).detach().float().square().sum(0)
    energy_NF = torch.empty(len(inputs_ND), block.d_ff)
    for start in range(0, len(inputs_ND), _ROWS):
        rows = slice(start, start + _ROWS)
        away_RF = hidden(block, material.read, inputs_ND[rows]).detach() - mean_F
        energy_NF[rows] = F.normalize(away_RF.square() * square_F, p=1, eps=torch.finfo(torch.float32).tiny)
    if not energy_NF.isfinite().all():
        raise Refused(
            "the energy of the hidden units is NaN: the down projection or the hidden values are NaN or too large",
            where=block.path,
            hint="use another method, such as carve",
        )
    return energy_NF


def ascend(energy_NF: Tensor, parts: Parts, iterations: int) -> Tensor:
    """The part of each unit, int64 [F]: the number of its expert, or ``parts.experts`` for a shared unit."""
    size_P = np.full(parts.experts, parts.width)
    if parts.shared:
        size_P = np.append(size_P, parts.shared * parts.width)
    part_F = deal(energy_NF, parts)
    gates_NP, captured = choose(energy_NF, part_F, parts)
    for _ in range(iterations):
        score_FP = energy_NF.t() @ gates_NP[:, : len(size_P)]
        found_F = torch.from_numpy(assign(-score_FP.numpy(), size_P))
        gates_NP, found = choose(energy_NF, found_F, parts)
        if found <= captured:
            break
        part_F, captured = found_F, found
    return part_F


def deal(energy_NF: Tensor, parts: Parts) -> Tensor:
    """The part of each unit to start with: the largest mean energies are shared, the others are dealt out by rank."""
    _, rest = most(energy_NF.mean(0), parts.shared * parts.width)
    part_F = torch.full((energy_NF.shape[1],), parts.experts)
    part_F[rest] = torch.arange(len(rest)) % parts.experts
    return part_F


def choose(energy_NF: Tensor, part_F: Tensor, parts: Parts) -> tuple[Tensor, float]:
    """``(G, captured)``: which parts a token gets, 0 or 1 in float32 [N, E + 1], the shared one last, and what is
    captured so.
    """
    held_NP = energy_NF @ F.one_hot(part_F, parts.experts + 1).float()
    gates_NP = torch.zeros_like(held_NP)
    gates_NP.scatter_(1, held_NP[:, : parts.experts].topk(parts.top_k).indices, 1)
    gates_NP[:, parts.experts] = 1
    return gates_NP, float((held_NP * gates_NP).sum(dtype=torch.float64))
