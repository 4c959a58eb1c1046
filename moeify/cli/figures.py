"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: int) -> str:
    """Three digits and a unit: 384, 1.18M, 22.7M."""
    value = float(number)
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    if not unit:
        return str(number)
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"


def change(before: int, after: int) -> str:
    """``1.18M -> 9.44M``."""
    return f"{count(before)} -> {count(after)}"


def error(value: float | None) -> str:
    """``2.1e-07``; '' when it was not measured."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Aligned columns; empty ones are left out. Where they do not fit, the first has a line of its own.

    The first line returned is the header (the first two, when it does not fit).
    """
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    cells = [[row[i] for i in kept] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(kept))]
    if sum(widths) + 2 * len(widths) <= width:
        return [_join(row, widths) for row in cells]
    return [line for row in cells for line in (f"  {row[0]}", "  " + _join(row[1:], widths[1:]))]


def _join(cells: Sequence[str], widths: Sequence[int]) -> str:
    return ("  " + "  ".join(cell.ljust(size) for cell, size in zip(cells, widths))).rstrip()
