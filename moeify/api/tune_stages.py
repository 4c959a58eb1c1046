"""How long each part of tuning takes, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moeify.api.progress import Progress


@dataclass
class Stages:
    """A ``Progress`` that hands on to another one, with ``prefix`` before the text, and adds up seconds by part."""

    progress: Progress
    prefix: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, text: str, total: int | None = None) -> None:
        self.progress.stage(f"{self.prefix}{text}", total)

    def advance(self, n: int = 1) -> None:
        self.progress.advance(n)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started
