"""Ranks that are processes, on gloo. Started by a fork server that has torch and the programs already, so that four of
them cost tenths of a second."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Collection
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
    work: Callable[..., Any],
    size: int,
    folder: Path,
    *args: Any,
    ep: int = 0,
    seconds: float = 180,
    stuck: Collection[int] = (),
    first_holds_store: bool = False,
) -> list[Outcome]:
    """``work(mesh, *args)`` in ``size`` processes on a mesh of ``ep`` columns (all of them by default).

    A process that has not ended after ``seconds`` is killed, and its exit code is None. Those that are ``stuck`` are
    killed when the others have ended. With ``first_holds_store`` the store ends with rank 0.
    """
    folder.mkdir(exist_ok=True)
    shape = (size,) if ep in (0, size) else (size // ep, ep)
    more = (shape, folder, first_holds_store, args)
    processes = [_CONTEXT.Process(target=_one, args=(work, rank, size, *more)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    outcomes = {}
    for rank in sorted(range(size), key=lambda rank: rank in stuck):
        process = processes[rank]
        process.join(0 if rank in stuck else max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
            outcomes[rank] = Outcome(None)
            continue
        written = folder / f"{rank}.pickle"
        found = pickle.loads(written.read_bytes()) if written.exists() else {}
        outcomes[rank] = Outcome(process.exitcode, **found)
    return [outcomes[rank] for rank in range(size)]


def results(outcomes: list[Outcome]) -> list[Any]:
    """What all ranks returned; the first error otherwise."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"rank {rank} ended with {outcome.code}: {outcome.error}"
    return [outcome.result for outcome in outcomes]


def _one(
    work: Callable[..., Any],
    rank: int,
    size: int,
    shape: tuple[int, ...],
    folder: Path,
    first_holds_store: bool,
    args: Any,
) -> None:
    torch.set_num_threads(1)
    store = _store_of_first(rank, folder) if first_holds_store else dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
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


def _store_of_first(rank: int, folder: Path) -> dist.Store:
    """Without torchrun it is rank 0 that holds the store. The system chooses the port."""
    told = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "port.part").write_text(str(store.port))
        (folder / "port.part").rename(told)
        return store
    while not told.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(told.read_text()), is_master=False)
