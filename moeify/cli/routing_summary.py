"""What ``moeify inspect --routing`` shows: a heat map of loads, figures by block, agreement between blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.cli.figures import table
from moeify.cli.output import Screen

if TYPE_CHECKING:
    from rich.text import Text

    from moeify.api.routing import FileRouting
    from moeify.training.routing_report import BlockRouting

_COLUMN = 13
_SHADES = " \u2591\u2592\u2593\u2588"  # shade blocks, light to full
_FULL = 2.0  # load over the mean from which a cell is full
_MOST = 64  # cells of a row


def show(screen: Screen, found: FileRouting) -> None:
    report = found.report
    screen.line(f"{found.model}: what its routers do", "bold")
    screen.line()
    names = [block.path or "(the model)" for block in report.blocks]
    column = max(len(name) for name in names) + 2
    for name, block in zip(names, report.blocks):
        for number, cells in enumerate(_cells(block)):
            screen.line(_row(name if number == 0 else "", cells, column))
    screen.line()
    header = ("block", "tokens", "experts", "entropy", "cv", "max/mean", "per token", "dropped")
    rows = [
        (
            name,
            str(block.tokens),
            str(len(block.load)),
            f"{block.entropy:.3f}",
            f"{block.cv:.2f}",
            f"{block.peak:.2f}",
            f"{block.experts_per_token:.2f}",
            f"{block.dropped:.1%}",
        )
        for name, block in zip(names, report.blocks)
    ]
    for number, line in enumerate(table(header, rows, screen.width)):
        screen.line(line, "bold" if number == 0 else None)
    screen.line()
    screen.paragraph(
        "load",
        f"a cell is an expert: empty without tokens, full from {_FULL:g} times the mean; entropy 1 is equal loads",
        column=_COLUMN,
    )
    pairs = [
        (value, names[i], names[i + 1])
        for i in range(len(names) - 1)
        if (value := report.agreement[i][i + 1]) is not None
    ]
    if pairs:
        mean = sum(value for value, _, _ in pairs) / len(pairs)
        value, one, other = max(pairs)
        text = (
            f"{mean:.2f} on average between a block and the next, at most {value:.2f} ({one} and {other}); 1: the same "
            "tokens are together, 0: independent"
        )
        screen.paragraph("agreement", text, column=_COLUMN)
    screen.paragraph("data", found.source, column=_COLUMN)
    for note in found.notes:
        screen.paragraph("note", note, column=_COLUMN)


def _cells(block: BlockRouting) -> list[list[float]]:
    """Loads over their mean, in rows that a screen can show."""
    over = [share * len(block.load) for share in block.load]
    return [over[start : start + _MOST] for start in range(0, len(over), _MOST)]


def _row(name: str, cells: list[float], column: int) -> Text:
    from rich.text import Text

    line = Text(name.ljust(column))
    wide = 2 if len(cells) <= _MOST // 2 else 1
    for value in cells:
        shade = _SHADES[0] if value == 0 else _SHADES[1 + min(3, int(value / _FULL * 4))]
        line.append(shade * wide, style=_colour(value))
    return line


def _colour(value: float) -> str:
    return "blue" if value < 0.5 else "green" if value < 1.5 else "red"
