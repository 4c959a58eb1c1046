"""``python -m moeify.run`` on several ranks, started as torchrun starts them, by the fork server of tests/ranks.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moeify.run import main
from tests.ranks import _CONTEXT


@dataclass
class Ended:
    """How a rank ended, and what it printed."""

    code: int | None
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def run(
    size: int,
    folder: Path,
    *arguments: object,
    seconds: float = 300,
    disturb: Callable[[list[Any]], None] = lambda processes: None,
) -> list[Ended]:
    """The runner on ``size`` ranks, or on one in this process; ``disturb`` gets the processes when started."""
    words = [str(word) for word in arguments]
    if size == 1:
        return [_here(words)]
    folder.mkdir(parents=True, exist_ok=True)
    # Here as in torchrun's own process: on a port that the system chooses.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [_CONTEXT.Process(target=_one, args=(words, rank, size, store.port, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    disturb(processes)
    deadline = time.monotonic() + seconds
    ended = []
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        texts = [(folder / f"{rank}.{kind}") for kind in ("out", "err")]
        ended.append(Ended(code, *(text.read_text() if text.exists() else "" for text in texts)))
    return ended


def when_exists(path: Path, act: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
    """A disturbance that waits for a file or folder first."""

    def disturb(processes: list[Any]) -> None:
        deadline = time.monotonic() + 180
        while not path.exists() and any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, f"{path} did not come"
            time.sleep(0.01)
        act(processes)

    return disturb


def kill(rank: int, number: int = signal.SIGKILL) -> Callable[[list[Any]], None]:
    return lambda processes: os.kill(processes[rank].pid, number)


def _one(words: list[str], rank: int, size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    ended = _here(words)
    (folder / f"{rank}.out").write_text(ended.out)
    (folder / f"{rank}.err").write_text(ended.err)
    raise SystemExit(ended.code)


def _here(words: list[str]) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return Ended(code, out.getvalue(), err.getvalue())
