"""Where text goes: one JSON object, or lines on a screen, or a file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.errors import OutputNotWritten

if TYPE_CHECKING:
    from rich.text import Text


class Screen:
    """Lines for a person on stdout. Nothing is ever cut off: what is too wide wraps."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False, emoji=False)
        self.width = self._console.width

    def line(self, text: str | Text = "", style: str | None = None) -> None:
        self._console.print(text, style=style, soft_wrap=True)

    def paragraph(self, head: str, text: str, *, column: int = 0, style: str | None = None) -> None:
        """``head`` and, from ``column`` on, the text wrapped to the width."""
        from rich.text import Text

        wrapped = textwrap.wrap(text, max(self.width - column, 30), break_long_words=False, break_on_hyphens=False) or [
            ""
        ]
        gap = " " * max(column - len(head), 1 if head else 0)
        self.line(Text(head, style or "").append(gap + wrapped[0], style=""))
        for more in wrapped[1:]:
            self.line(" " * column + more)


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """While this lasts, what libraries print goes to stderr, so that stdout holds one JSON object."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def write_json(value: dict[str, Any]) -> None:
    """One object. JSON has no NaN and no infinity: they are written as the strings "nan" and "inf"."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputNotWritten."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        raise OutputNotWritten(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
