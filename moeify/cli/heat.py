"""A heat map of experts' loads in text: a row of shaded cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

FULL = 2.0  # load over the mean from which a cell is full
_SHADES = " \u2591\u2592\u2593\u2588"  # shade blocks, light to full
_MOST = 64  # cells of a line


def heat_row(name: str, load: Sequence[float], column: int) -> Iterator[Text]:
    """The share of each expert over the mean, from ``column`` on; several lines where there are many experts."""
    over = [share * len(load) for share in load]
    for start in range(0, len(over), _MOST):
        yield _line("" if start else name, over[start : start + _MOST], column)


def _line(name: str, cells: list[float], column: int) -> Text:
    from rich.text import Text

    line = Text(name.ljust(column))
    wide = 2 if len(cells) <= _MOST // 2 else 1
    for value in cells:
        shade = _SHADES[0] if value == 0 else _SHADES[1 + min(3, int(value / FULL * 4))]
        line.append(shade * wide, style=_colour(value))
    return line


def _colour(value: float) -> str:
    return "blue" if value < 0.5 else "green" if value < 1.5 else "red"
