"""The program between passes, printed or written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeify.errors import OutputNotWritten
from moeify.ir.printer import program_text
from moeify.ir.program import Program
from moeify.pipeline import PASSES
from moeify.pipeline.base import Pass

Show = Callable[[str, str], None]


@dataclass
class Dumps:
    """Which intermediate programs are printed or written, and where they go."""

    show: Show | None = None
    passes: Sequence[str] = ()
    everything: bool = False
    folder: Path | None = None
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in self.passes:
            PASSES.cls(name)  # an unknown name is an error before any work
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputNotWritten(f"cannot make the folder {self.folder}: {error.strerror}") from error

    def after(self, one: Pass, program: Program) -> None:
        self._count += 1
        wanted = self.show is not None and (self.everything or one.name in self.passes)
        if not wanted and self.folder is None:
            return
        text = program_text(program, title=f"after {one}")
        if wanted and self.show is not None:
            self.show(f"after {one}", text)
        if self.folder is not None:
            path = self.folder / f"{self._count:02d}-{one.name}.txt"
            try:
                path.write_text(text)
            except OSError as error:
                raise OutputNotWritten(f"cannot write {path}: {error.strerror}") from error
