"""Measuring alpha and bandwidth of an all-to-all on this machine, with real processes over gloo.

Every rank sends the same number of bytes to every other, from one byte up; the time of a size is that of the slowest
rank in the best round, which a busy neighbour disturbs least. ``t = (W - 1) alpha + n / B`` is fitted to it, n the
bytes that leave a rank, each size weighing alike (least squares of relative errors). All ranks also time one large
matrix product and one sum over an array that no cache holds, all at once, as they would compute side by side.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy
import torch
import torch.distributed as dist

from moeify.distributed.labels import MEASURED, Figure
from moeify.distributed.network import Machine
from moeify.errors import BadOption, RuntimeUnavailable

SIZES = tuple(4**n for n in range(12))  # bytes to each other rank: 1 to 4 MiB
_GEMM, _STREAM = 1024, 64 << 20
_SETTLE = 2  # untimed rounds
_PARTING = 5.0  # seconds that a rank may take to end when it has answered


@dataclass(frozen=True)
class Calibration:
    """``points`` are (bytes that leave a rank, seconds measured, seconds fitted)."""

    ranks: int
    threads: int
    points: tuple[tuple[int, float, float], ...]
    machine: Machine

    @property
    def where(self) -> str:
        return f"gloo, {self.ranks} processes of {self.threads} thread{'s' * (self.threads > 1)} on one machine"

    @property
    def error(self) -> float:
        """The largest relative error of the fit."""
        return max(abs(fitted / seconds - 1.0) for _, seconds, fitted in self.points)


def calibrate(
    ranks: int = 2,
    *,
    threads: int = 1,
    sizes: Sequence[int] = SIZES,
    rounds: int = 15,
    timeout: float = 120.0,
) -> Calibration:
    """Start ``ranks`` processes and measure. Raises BadOption, and RuntimeUnavailable when a process dies or hangs."""
    for name, value, least in (("ranks", ranks, 2), ("threads", threads, 1), ("rounds", rounds, 1)):
        if value < least:
            raise BadOption(f"the number of {name} is {value}: it must be at least {least}")
    if not dist.is_available() or not dist.is_gloo_available():
        raise RuntimeUnavailable("this torch has no gloo", hint="install one that has torch.distributed")
    results = _run(ranks, (tuple(sizes), rounds, threads, timeout), timeout)
    by_size = zip(*(result["seconds"] for result in results), strict=True)
    slowest = [min(map(max, zip(*per_rank, strict=True))) for per_rank in by_size]
    leaving = [size * (ranks - 1) for size in sizes]
    alpha, bandwidth = fit(leaving, slowest, ranks)
    points = tuple(
        (n, seconds, (ranks - 1) * alpha + n / bandwidth) for n, seconds in zip(leaving, slowest, strict=True)
    )
    machine = Machine(
        intra_latency=Figure(alpha, "s", MEASURED),
        intra_bandwidth=Figure(bandwidth, "B/s", MEASURED),
        peak=Figure(min(result["peak"] for result in results), "FLOP/s", MEASURED),
        memory_bandwidth=Figure(min(result["memory_bandwidth"] for result in results), "B/s", MEASURED),
        memory=Figure(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks, "B", MEASURED),
    )
    return Calibration(ranks, threads, points, machine)


def fit(leaving: Sequence[float], seconds: Sequence[float], ranks: int) -> tuple[float, float]:
    """(alpha, bandwidth) of ``t = (W - 1) alpha + n / B``: least squares of relative errors, none negative."""
    n, t = numpy.asarray(leaving, dtype=numpy.float64), numpy.asarray(seconds, dtype=numpy.float64)
    columns = numpy.stack([(ranks - 1) / t, n / t], axis=1)
    (alpha, per_byte), *_ = numpy.linalg.lstsq(columns, numpy.ones(len(t)), rcond=None)
    if alpha < 0:
        alpha, per_byte = 0.0, columns[:, 1].sum() / (columns[:, 1] ** 2).sum()
    elif per_byte <= 0:  # no size was large enough to tell a byte from nothing
        raise RuntimeUnavailable("the times do not grow with the bytes", hint="measure again, with larger sizes")
    return float(alpha), float(1.0 / per_byte)


def _run(ranks: int, options: tuple, timeout: float) -> list[dict[str, Any]]:
    """One process per rank. ``forkserver`` with torch loaded beforehand: a start costs milliseconds, not seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", __name__])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_rank, args=(rank, ranks, str(Path(folder, "meet")), pipes[rank][1], *options))
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            for _, sender in pipes:
                sender.close()  # else a dead process would not close it
            results = _collect([receiver for receiver, _ in pipes], timeout)
            for process in processes:
                process.join(_PARTING)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: Sequence[Connection], timeout: float) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    end = time.monotonic() + timeout
    while len(found) < len(pipes):
        left: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in found}
        ready = wait(list(left), max(end - time.monotonic(), 0.0))
        if not ready:
            raise RuntimeUnavailable(
                f"rank {min(left.values())} has not finished in {timeout:g} seconds", hint="calibrate with fewer ranks"
            )
        for pipe in cast("list[Connection]", ready):
            rank = left[pipe]
            try:
                found[rank] = pipe.recv()
            except EOFError:
                raise RuntimeUnavailable(f"rank {rank} ended before it had measured anything") from None
            if "error" in found[rank]:
                raise RuntimeUnavailable(f"rank {rank} could not measure: {found[rank]['error']}")
    return [found[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, ranks: int, meet: str, pipe: Connection, sizes: Sequence[int], rounds: int, threads: int, timeout: float
) -> None:
    torch.set_num_threads(threads)
    try:
        dist.init_process_group(
            "gloo", f"file://{meet}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
        )
        exchanges = [_exchange(size, ranks) for size in sizes]
        a, data = torch.rand(_GEMM, _GEMM), torch.ones(_STREAM // 4)
        out = torch.empty(_GEMM, _GEMM)
        pipe.send(
            {
                "seconds": [_seconds(call, rounds) for call in exchanges],
                "peak": 2.0 * _GEMM**3 / min(_seconds(lambda: torch.mm(a, a, out=out), rounds)),
                "memory_bandwidth": _STREAM / min(_seconds(data.sum, rounds)),
            }
        )
        dist.barrier()
    except RuntimeError as error:
        pipe.send({"error": str(error).partition("\n")[0]})
    finally:
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _exchange(size: int, ranks: int) -> Callable[[], object]:
    sent = torch.zeros(size * ranks, dtype=torch.uint8)
    received = torch.empty_like(sent)
    return lambda: dist.all_to_all_single(received, sent)


def _seconds(call: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round; all ranks begin one together."""
    found = []
    for number in range(_SETTLE + rounds):
        dist.barrier()
        start = time.perf_counter()
        call()
        if number >= _SETTLE:
            found.append(time.perf_counter() - start)
    return found
