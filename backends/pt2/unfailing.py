"""A file for torch's zip writer, which ends the whole process when a write fails while it closes."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Unfailing(io.BufferedWriter):
    """Takes everything; what goes wrong is kept in ``error``, and nothing more is written then."""

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                super().write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def interrupt(self, *signal: Any) -> None:
        """A Ctrl-C waits too: raised inside a write, it would leave the zip writer in disorder."""
        self.error = self.error or KeyboardInterrupt()


@contextmanager
def unfailing(path: Path) -> Iterator[Unfailing]:
    """An ``Unfailing`` on a new file; what went wrong is raised when the writer is done."""
    with Unfailing(io.FileIO(path, "w")) as file:
        # Signals are delivered to the main thread only, and a job in the background may have been told to ignore them.
        before = signal.getsignal(signal.SIGINT)
        ours = threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN
        if ours:
            signal.signal(signal.SIGINT, file.interrupt)
        try:
            yield file
        finally:
            if ours:
                signal.signal(signal.SIGINT, before)
        if file.error is not None:
            raise file.error
