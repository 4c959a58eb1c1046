"""One process that trains by itself: the runner's steps and checkpoints, without torch.distributed.

The graph is not sharded, so nothing is exchanged and any device will do. Checkpoints are those of any number of ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from moeify.distributed.binding import Binding, as_bound
from moeify.distributed.board import Board
from moeify.distributed.groups import Groups
from moeify.distributed.runner_group import Ranks
from moeify.ir.modes import TrainableGraph
from moeify.ir.program import Program
from moeify.ir.roles import EXPERTS
from moeify.ir.sharding import Sharding

_RUNS = itertools.count()


@dataclass(frozen=True)
class NoOthers:
    """A group of one."""

    rank: int = 0
    size: int = 1

    def all_to_all(self, x: Tensor, out_splits: list[int], in_splits: list[int], where: str) -> Tensor:
        return x

    def all_reduce(self, x: Tensor, where: str) -> Tensor:
        return x


def alone() -> Ranks:
    """The only rank of a run. No process group is made or asked for."""
    board = Board(dist.HashStore(), f"alone-{next(_RUNS)}", (0,))  # a store in memory
    return Ranks(None, Groups({EXPERTS: NoOthers()}, 0, (0,), board), NoOthers())


def bind_alone(program: Program, ranks: Ranks) -> TrainableGraph:
    """The program, which is used up, as a module with all its experts, in eval mode."""
    return as_bound(program, Binding(ranks.groups, Sharding(1, 0, "dropless", ())))
