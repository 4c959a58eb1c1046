"""Graphs on the screen: the layers in order, then the text of each distinct one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from moeify.cli.figures import table
from moeify.cli.output import Screen
from moeify.ir.printer import op_name
from moeify.ir.views.diff import Change
from moeify.ir.views.folding import Fold, fold

if TYPE_CHECKING:
    from moeify.ir.program import Program

# Colours of the printer's text, in the order in which they are laid on.
_COLOURS = (
    (re.compile(r"^\s*%\w+( : .*?) = "), 1, "dim"),
    (re.compile(r"@[\w.]+"), 0, "green"),
    (re.compile(r"\bmoe\.\w+"), 0, "bold cyan"),
    (re.compile(r"  # .*$"), 0, "dim"),
)


def graph(screen: Screen, program: Program) -> None:
    """An outline with a row per distinct layer, then one text per distinct layer."""
    folds = fold(program)
    screen.line("layers", "bold")
    rows = [(_title(part), str(len(part.lines)), _operators(part)) for part in folds]
    for line in table(("layer", "nodes", "moe operators"), rows, screen.width):
        screen.line(line)
    screen.line()
    for spec in program.inputs:
        screen.line(f"# {spec}", "dim")
    for part in folds:
        screen.line()
        screen.line(_title(part), "bold")
        for line in part.lines:
            screen.line(_coloured(f"  {line}"))


def changes(screen: Screen, found: Sequence[Change]) -> None:
    """Before (-) and after (+), the same change once."""
    if not found:
        screen.line("no difference")
    for number, change in enumerate(found):
        if number:
            screen.line()
        screen.line(f"{change.label}  x{change.count}" if change.count > 1 else change.label, "bold")
        for line in change.lines:
            style = {"-": "red", "+": "green", "@": "dim"}.get(line[0])
            screen.line(f"  {line[0]} {line[1:]}" if line != "@" else "    ...", style)


def _title(part: Fold) -> str:
    return f"{part.label}  x{part.count}" if part.count > 1 else part.label


def _operators(part: Fold) -> str:
    names = Counter(name for name in map(op_name, part.layers[0].nodes) if name.startswith("moe."))
    return ", ".join(f"{name} x{n}" if n > 1 else name for name, n in names.items())


def _coloured(line: str) -> Text:
    text = Text(line)
    for pattern, group, style in _COLOURS:
        for match in pattern.finditer(line):
            text.stylize(style, *match.span(group))
    return text
