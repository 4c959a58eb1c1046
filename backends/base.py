"""What a backend is: a table of what it lowers and what it never will, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moeify.errors import Refused
from moeify.ir.program import Program
from moeify.ir.where import source_line
from moeify.pipeline.rules import is_moe
from moeify.registry import render


@dataclass(frozen=True)
class Backend:
    """A target. ``LOWER`` says what becomes of each ``moe.*`` operator, ``NEVER`` which are refused and why."""

    name: ClassVar[str] = ""
    LOWER: ClassVar[Mapping[str, str]] = {}
    NEVER: ClassVar[Mapping[str, str]] = {}

    def check(self, program: Program) -> None:
        """Raises Refused for the first operator that this target does not take."""
        for node in program.graph.nodes:
            if not is_moe(node):
                continue
            operator = node.target._opname
            if operator not in self.LOWER:
                why = self.NEVER.get(operator, "no lowering has been written")
                raise Refused(f"the {self.name} backend does not take moe.{operator}: {why}", where=source_line(node))

    def __str__(self) -> str:
        return render(self)
