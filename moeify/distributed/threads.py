"""Ranks that are threads of one process: for tests of numbers and shapes at sizes that processes are too slow for.

No device is used, no connection made; every thread sees its own roles. Ranks take turns under Python's lock, so that
timings mean nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moeify.distributed.board import Board
from moeify.distributed.groups import Groups
from moeify.distributed.lost import explain, telling
from moeify.ir import roles
from moeify.ir.roles import DATA, EXPERTS

T = TypeVar("T")
_RUNS = itertools.count()


class _Meeting:
    """Where the threads of a group lay down what they send."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.barrier = threading.Barrier(len(ranks))
        self.table: list[list[Tensor]] = [[] for _ in ranks]


@dataclass(frozen=True)
class ThreadTransport:
    """A thread's place in a group of threads. Sums add up in the order of the ranks, so that all get the same bits."""

    meeting: _Meeting
    rank: int
    seconds: float
    board: Board = field(compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.meeting.ranks)

    def all_to_all(self, x: Tensor, out_splits: list[int], in_splits: list[int], where: str) -> Tensor:
        return self._meet(list(x.split(in_splits)), lambda table: torch.cat([sent[self.rank] for sent in table]), where)

    def all_reduce(self, x: Tensor, where: str) -> Tensor:
        total = self._meet([x], lambda table: torch.stack([sent[0] for sent in table]).sum(0), where)
        return x.copy_(total)

    def _meet(self, sent: list[Tensor], read: Callable[[list[list[Tensor]]], Tensor], where: str) -> Tensor:
        meeting = self.meeting
        try:
            meeting.table[self.rank] = sent
            meeting.barrier.wait(self.seconds)
            result = read(meeting.table)
            meeting.barrier.wait(self.seconds)  # nobody changes what another still reads
            return result
        except threading.BrokenBarrierError as error:
            me = meeting.ranks[self.rank]
            # A rank that raises has told the others before: what is left is one that does not come.
            late = RuntimeError("timed out")
            raise explain(late, self.board, me, meeting.ranks, where, self.seconds) from error


def run_ranks(work: Callable[[Groups], T], ep: int, dp: int = 1, seconds: float = 60.0) -> list[T]:
    """``work`` on ``dp * ep`` ranks, the ``ep`` ones of a group next to each other; the results by rank.

    The first error of a rank is raised here; the others are freed at once.
    """
    ranks = tuple(range(ep * dp))
    board = Board(dist.HashStore(), f"threads-{next(_RUNS)}", ranks)
    ep_meetings = [_Meeting(tuple(ranks[i * ep : (i + 1) * ep])) for i in range(dp)]
    dp_meetings = [_Meeting(tuple(ranks[i::ep])) for i in range(ep)]
    errors: list[BaseException] = []
    gradients = torch.is_grad_enabled()  # a thread starts with its own

    def one(rank: int) -> T:
        row, column = divmod(rank, ep)
        by_role = {EXPERTS: ThreadTransport(ep_meetings[row], column, seconds, board)}
        if dp > 1:
            by_role[DATA] = ThreadTransport(dp_meetings[column], row, seconds, board)
        try:
            with roles.only_here(by_role), torch.set_grad_enabled(gradients), telling(board, rank):
                try:
                    return work(Groups(by_role, rank, ranks, board, seconds, in_threads=True))
                except BaseException as error:
                    errors.append(error)  # before the others are told, whose errors follow from it
                    raise
        except BaseException:
            for meeting in (*ep_meetings, *dp_meetings):
                meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(one, rank) for rank in ranks]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
