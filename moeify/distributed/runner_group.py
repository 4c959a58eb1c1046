"""The ranks of a run: started from torchrun's environment, or one process alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moeify.distributed.groups import Groups, named
from moeify.distributed.processes import SECONDS, ProcessTransport, groups_of
from moeify.errors import BadOption, NonFiniteValues, RankLost, RuntimeUnavailable
from moeify.ir import roles
from moeify.ir.roles import DATA, EXPERTS, Transport

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among the others. ``everyone`` is the group of all of them; a run of one process needs no mesh."""

    mesh: DeviceMesh | None
    groups: Groups
    everyone: Transport
    device: torch.device = _CPU  # of this rank's part of the model

    @property
    def rank(self) -> int:
        return self.groups.rank

    @property
    def size(self) -> int:
        return self.groups.size

    def total(self, values: Sequence[float], where: str) -> list[float]:
        """The sums over all ranks."""
        return self.everyone.all_reduce(self._tensor(values), where).tolist()

    def total_loss(self, loss: float, count: float, where: str, flag: bool = False) -> tuple[float, float, bool]:
        """The sums of a loss and its count, and whether any rank raised its flag.

        Raises NonFiniteValues, the same on every rank, naming the ranks whose loss is NaN or infinity.
        """
        finite = torch.isfinite(torch.tensor(loss)).item()
        bad = [float(rank == self.rank and not finite) for rank in range(self.size)]
        loss, count, flags, *bad = self.total([loss if finite else 0.0, count, float(flag), *bad], where)
        ranks = [rank for rank, mark in enumerate(bad) if mark]
        if ranks:
            on, of = (f" on {named(ranks)}", " of that rank") if self.size > 1 else ("", "")
            raise NonFiniteValues(
                f"the loss is NaN or infinity{on}",
                where=where,
                hint=f"look at the data{of}; a smaller learning rate helps where the weights have diverged",
            )
        return loss, count, flags > 0

    def to_first(self, x: Tensor, rows: Sequence[int], where: str) -> Tensor:
        """The rows of all ranks, ``rows[r]`` of rank r, one below the other on rank 0; none on the others."""
        sent = [rows[self.rank], *[0] * (self.size - 1)]
        received = list(rows) if self.rank == 0 else [0] * self.size
        return self.everyone.all_to_all(x.contiguous(), received, sent, where)

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)


def start(expert_ranks: int | None = None, seconds: float = SECONDS, device: str = "cpu") -> Ranks:
    """Join the others that torchrun has started, or be alone where it has not.

    ``expert_ranks`` share one set of experts, all by default; the others hold the same. On ``device`` "cpu" everything
    is exchanged over gloo; on "cuda" every rank has the GPU of its LOCAL_RANK, tensors there go over NCCL and the few
    numbers on the CPU over gloo. Raises BadOption, RuntimeUnavailable where this rank has no GPU, or RankLost when not
    all come within ``seconds``.
    """
    place = _place(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    ep = expert_ranks or size
    if size % ep:
        fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise BadOption(f"{size} ranks do not split into groups of {ep}", hint=f"choose --expert-ranks out of {fits}")
    _join(seconds, place)
    shape, names = ((size,), (EXPERTS,)) if ep == size else ((size // ep, ep), (DATA, EXPERTS))
    mesh = init_device_mesh(place.type, shape, mesh_dim_names=names)
    groups = groups_of(mesh, seconds)
    assert dist.group.WORLD is not None
    return Ranks(mesh, groups, ProcessTransport(dist.group.WORLD, seconds, groups.board), place)


def stop() -> None:
    """Leave the group: at the end of work that went well, or where there are no others to disturb."""
    roles.unbind()
    if dist.is_initialized():
        dist.destroy_process_group()


def _place(device: str) -> torch.device:
    """This rank's own device: NCCL takes one GPU to a rank."""
    if device == "cpu":
        return _CPU
    if device != "cuda":
        raise BadOption(f"there is no device {device!r} for ranks", hint="choose cpu or cuda")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there or not dist.is_nccl_available():
        have = "this torch has no NCCL" if there else "there is no GPU that torch can use here"
        what = f"rank {local} of this machine has no GPU: it has {there}" if 0 < there <= local else have
        raise RuntimeUnavailable(what, hint="choose --device cpu, or start as many ranks as there are GPUs")
    place = torch.device("cuda", local)
    torch.cuda.set_device(place)
    return place


def _join(seconds: float, place: torch.device) -> None:
    limit = timedelta(seconds=seconds)
    backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        return
    try:
        dist.init_process_group(backend, timeout=limit)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankLost(
            f"rank {os.environ['RANK']} did not meet the others: {str(error).splitlines()[0]}",
            where=where,
            hint="start as many ranks as torchrun was told, all with the same address and port",
        ) from error


class Signals:
    """While this lasts, SIGTERM and SIGINT set ``name`` instead of ending the process: a step is finished first."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():  # Python hands signals to no other
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
