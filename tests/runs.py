"""``python -m moeify.run`` on several ranks, started as torchrun starts them, by the fork server of tests/ranks.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    seconds: float = 120,
    disturb: Callable[[list[Any]], None] = lambda processes: None,
) -> list[Ended]:
    """The runner on ``size`` ranks; ``disturb`` gets the processes once they have started."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    words = [str(word) for word in arguments]
    processes = [_CONTEXT.Process(target=_one, args=(words, rank, size, port, folder)) for rank in range(size)]
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
        deadline = time.monotonic() + 60
        while not path.exists() and any(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, f"{path} did not come"
            time.sleep(0.01)
        act(processes)

    return disturb


def kill(rank: int, number: int = signal.SIGKILL) -> Callable[[list[Any]], None]:
    return lambda processes: os.kill(processes[rank].pid, number)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _one(words: list[str], rank: int, size: int, port: int, folder: Path) -> None:
    import torch

    from moeify.run import main

    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    finally:
        (folder / f"{rank}.out").write_text(out.getvalue())
        (folder / f"{rank}.err").write_text(err.getvalue())
    raise SystemExit(code)
