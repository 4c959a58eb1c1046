"""Ranks that are processes, on gloo. Started by a fork server that has torch and the programs already, so that four of
them cost tenths of a second."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.rank_work", "tests.checkpoint_work", "tests.run_losses"])


@dataclass
class Outcome:
    """How a process ended: its exit code, what its work returned, or the text of what it raised."""

    code: int | None
    result: Any = None
    error: str = ""
    kind: str = ""


def run(
    work: Callable[..., Any], size: int, folder: Path, *args: Any, ep: int = 0, seconds: float = 180
) -> list[Outcome]:
    """``work(mesh, *args)`` in ``size`` processes on a mesh of ``ep`` columns (all of them by default).

    A process that has not ended after ``seconds`` is killed, and its exit code is None.
    """
    folder.mkdir(exist_ok=True)
    shape = (size,) if ep in (0, size) else (size // ep, ep)
    processes = [_CONTEXT.Process(target=_one, args=(work, rank, size, shape, folder, args)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    outcomes = []
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
            outcomes.append(Outcome(None))
            continue
        written = folder / f"{rank}.pickle"
        found = pickle.loads(written.read_bytes()) if written.exists() else {}
        outcomes.append(Outcome(process.exitcode, **found))
    return outcomes


def results(outcomes: list[Outcome]) -> list[Any]:
    """What all ranks returned; the first error otherwise."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"rank {rank} ended with {outcome.code}: {outcome.error}"
    return [outcome.result for outcome in outcomes]


def _one(work: Callable[..., Any], rank: int, size: int, shape: tuple[int, ...], folder: Path, args: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    mesh: DeviceMesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep")[-len(shape) :])
    try:
        found = {"result": work(mesh, *args)}
    except Exception as error:
        text = str(error)
        found = {"error": text, "kind": type(error).__name__}
        (folder / f"{rank}.log").write_text(traceback.format_exc())
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
        raise SystemExit(1) from error
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
