"""What a pass is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from moeify.ir.program import Program
from moeify.registry import render

Rule = Callable[[Program], None]  # raises BrokenProgram with the offending node


@dataclass
class Log:
    """What a pass has to say: one line each, shown with --print-after and kept in the history."""

    lines: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        self.lines.append(line)


@dataclass(frozen=True)
class Pass:
    """One rewrite. Options are dataclass fields; ``name`` is the file name with dashes; ``str()`` is the pipeline text.

    ``requires`` and ``ensures`` are rules that the runner checks before and after ``apply``, besides those that hold
    always.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[Rule, ...]] = ()
    ensures: ClassVar[tuple[Rule, ...]] = ()

    def apply(self, program: Program, log: Log) -> None:
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def __str__(self) -> str:
        return render(self)
