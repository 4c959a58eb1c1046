"""Where long work says how far it is. The command line draws it; a Python caller need not care."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def stage(self, text: str, total: int | None = None) -> None:
        """A new stage begins; ``total`` steps when that is known."""

    def advance(self, n: int = 1) -> None:
        """``n`` steps of the stage are done."""


class Silent:
    """No display."""

    def stage(self, text: str, total: int | None = None) -> None:
        return None

    def advance(self, n: int = 1) -> None:
        return None
