"""Progress bars on stderr, where stderr is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Bars:
    """A ``moeify.api`` Progress: one line per stage, a bar where the number of steps is known."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        class Steps(MofNCompleteColumn):
            def render(self, task: Any) -> Any:
                return super().render(task) if task.total is not None else ""

        console = Console(stderr=True)
        # stdout may be a file while stderr is a terminal: what is printed there must not be drawn here.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            Steps(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, text: str, total: int | None = None) -> None:
        self._finish()
        self._task = self._progress.add_task(text, total=total)

    def advance(self, n: int = 1) -> None:
        if self._task is not None:
            self._progress.advance(self._task, n)

    def aside(self, text: str) -> None:
        """Print on stdout with the bars out of the way."""
        self._progress.stop()
        print(text, flush=True)
        self._progress.start()

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
