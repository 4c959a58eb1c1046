"""Ranks that are processes: transports over the process groups of a device mesh."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moeify.distributed.board import Board
from moeify.distributed.groups import Groups
from moeify.distributed.lost import LOOK, explain, heed
from moeify.errors import BadOption
from moeify.ir.roles import DATA, EXPERTS

SECONDS = 300.0  # of an exchange; torch's own default is half an hour
_ONLY_THE_WAIT = "operation timed out"  # and the work goes on; where the work itself is too late, gloo says otherwise


@dataclass(frozen=True)
class ProcessTransport:
    """A process group. On the CPU every call ends after ``seconds``; on a GPU NCCL's own watchdog does that."""

    group: dist.ProcessGroup
    seconds: float
    board: Board = field(compare=False, repr=False)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def all_to_all(self, x: Tensor, out_splits: list[int], in_splits: list[int], where: str) -> Tensor:
        out = x.new_empty(sum(out_splits), *x.shape[1:])
        self._finish(
            lambda: dist.all_to_all_single(out, x, out_splits, in_splits, group=self.group, async_op=True), x, where
        )
        return out

    def all_reduce(self, x: Tensor, where: str) -> Tensor:
        self._finish(lambda: dist.all_reduce(x, group=self.group, async_op=True), x, where)
        return x

    def _finish(self, start: Callable[[], Any], x: Tensor, where: str) -> None:
        try:
            work = start()
            # A wait with a timeout blocks the host, which a GPU need not.
            self._wait(work, where) if x.device.type == "cpu" else work.wait()
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            raise explain(error, self.board, dist.get_rank(), ranks, where, self.seconds) from error

    def _wait(self, work: Any, where: str) -> None:
        """Until it is done, with looks at the board, so that a rank that waits answers and hears the others."""
        deadline = time.monotonic() + self.seconds
        while (left := deadline - time.monotonic()) > LOOK:
            try:
                work.wait(timedelta(seconds=LOOK))
                return
            except RuntimeError as error:
                if _ONLY_THE_WAIT not in str(error).lower():
                    raise
                heed(self.board, dist.get_rank(), where)
        work.wait(timedelta(seconds=max(left, 0.001)))


def groups_of(mesh: DeviceMesh, seconds: float = SECONDS) -> Groups:
    """This process's groups on a mesh with a dimension ``ep`` and perhaps one ``dp``, with an empty board.

    Every rank of the mesh calls it equally often. Raises BadOption for other dimensions.
    """
    names = mesh.mesh_dim_names or ()
    if EXPERTS not in names or not set(names) <= {EXPERTS, DATA}:
        raise BadOption(
            f"the dimensions of the mesh are named {', '.join(names) or 'nothing'}",
            hint="make it with mesh_dim_names=('ep',) or ('dp', 'ep')",
        )
    groups = {name: mesh.get_group(name) for name in names}
    members = tuple(int(rank) for rank in torch.as_tensor(mesh.mesh).flatten())
    assert dist.group.WORLD is not None  # a mesh cannot be made before init_process_group
    store = dist.group.WORLD.get_group_store()
    board = Board(store, f"moeify-{zlib.crc32(repr(members).encode())}", members, serves=_serves(store))
    board.begin()
    by_role = {name: ProcessTransport(group, seconds, board) for name, group in groups.items()}
    return Groups(by_role, dist.get_rank(), members, board, seconds)


def _serves(store: dist.Store) -> bool:
    """Whether the store ends with this process: torch lets rank 0 hold it, or torchrun's own process."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return isinstance(store, dist.TCPStore) and dist.get_rank() == 0 and not by_torchrun
