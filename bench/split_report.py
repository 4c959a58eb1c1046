"""What the benchmarks of splits print: rows of figures, and bars met or missed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 140  # of the tables, also where the output is a file


@dataclass(frozen=True)
class Bar:
    """A figure that is to be at most, or ``at_least``, the bar."""

    what: str
    figure: float
    bar: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.figure >= self.bar if self.at_least else self.figure <= self.bar


def finish(title: str, rows: list[dict[str, Any]], bars: list[Bar], *, seconds: float, as_json: bool) -> int:
    """Print it all; the process's exit code, 1 where a bar is missed."""
    if as_json:
        said = [{**asdict(bar), "met": bar.met} for bar in bars]
        print(json.dumps({"title": title, "rows": rows, "bars": said, "seconds": round(seconds, 1)}))
    else:
        console = Console(width=_WIDTH)
        table = Table(title=title, title_justify="left")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(str(row.get(column, "")) for column in columns))
        console.print(table)
        for bar in bars:
            side = "at least" if bar.at_least else "at most"
            console.print(f"{bar.what}: {bar.figure} (bar: {side} {bar.bar}): {'met' if bar.met else 'MISSED'}")
        console.print(f"all of it took {seconds:.0f} s")
    return 0 if all(bar.met for bar in bars) else 1
