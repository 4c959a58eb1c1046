"""Ranks that are processes: transports over the process groups of a device mesh."""

from __future__ import annotations

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
from moeify.distributed.lost import explain
from moeify.errors import BadOption
from moeify.ir.roles import DATA, EXPERTS

SECONDS = 300.0  # of an exchange; torch's own default is half an hour


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
            work.wait(timedelta(seconds=self.seconds)) if x.device.type == "cpu" else work.wait()
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            raise explain(error, self.board, dist.get_rank(), ranks, where, self.seconds) from error


def groups_of(mesh: DeviceMesh, seconds: float = SECONDS) -> Groups:
    """This process's groups on a mesh with a dimension ``ep`` and perhaps one ``dp``. Raises BadOption for others."""
    names = mesh.mesh_dim_names or ()
    if EXPERTS not in names or not set(names) <= {EXPERTS, DATA}:
        raise BadOption(
            f"the dimensions of the mesh are named {', '.join(names) or 'nothing'}",
            hint="make it with mesh_dim_names=('ep',) or ('dp', 'ep')",
        )
    groups = {name: mesh.get_group(name) for name in names}
    members = tuple(int(rank) for rank in torch.as_tensor(mesh.mesh).flatten())
    assert dist.group.WORLD is not None  # a mesh cannot be made before init_process_group
    board = Board(dist.group.WORLD.get_group_store(), f"moeify-{zlib.crc32(repr(members).encode())}")
    by_role = {name: ProcessTransport(group, seconds, board) for name, group in groups.items()}
    return Groups(by_role, dist.get_rank(), members, board, seconds)
