"""A place where ranks leave notes for each other outside of collectives: who came, and why somebody stopped.

A collective that fails says little and takes the connection with it. The store of ``torch.distributed`` still answers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

_SLICE = 0.5  # seconds between looks at who has stopped

# Of the process, since a mesh may get a board twice over one store. Every rank asks equally often.
_TURNS: Counter[tuple[str, int]] = Counter()


class Board:
    """Notes by (topic, rank) in a ``torch.distributed`` store. What the store cannot answer is an absent note."""

    def __init__(self, store: dist.Store, prefix: str = "moeify") -> None:
        self._store = store
        self._prefix = prefix

    def put(self, topic: str, rank: int, text: str) -> None:
        """Leave a note. A store that is gone, with the process that held it, takes none."""
        try:
            self._store.set(self._key(topic, rank), text)
        except (RuntimeError, OSError):  # torch's DistError is a RuntimeError
            return

    def get(self, topic: str, rank: int) -> str | None:
        """A note that is there now, or None."""
        try:
            key = self._key(topic, rank)
            return self._store.get(key).decode() if self._store.check([key]) else None
        except (RuntimeError, OSError):
            return None

    def wait(self, topic: str, ranks: Sequence[int], seconds: float) -> dict[int, str]:
        """The notes of these ranks that come in time; earlier when one of those that are missing has stopped."""
        deadline = time.monotonic() + seconds
        missing = list(ranks)
        while missing and (left := deadline - time.monotonic()) > 0:
            try:
                keys = [self._key(topic, rank) for rank in missing]
                self._store.wait(keys, timedelta(seconds=min(left, _SLICE)))
                break
            except (RuntimeError, OSError):
                missing = [rank for rank in missing if self.get(topic, rank) is None]
                if any(self.why_stopped(rank) for rank in missing):
                    break
        return {rank: text for rank in ranks if (text := self.get(topic, rank)) is not None}

    def turn(self, rank: int) -> int:
        """How often this rank has asked before: a number that tells one meeting of the ranks from the next."""
        _TURNS[self._prefix, rank] += 1
        return _TURNS[self._prefix, rank]

    def stop(self, rank: int, why: str) -> None:
        """Say why this rank ends, for those that will wait for it in vain."""
        self.put("stopped", rank, why)

    def why_stopped(self, rank: int) -> str | None:
        """What the rank said when it ended, if it did."""
        return self.get("stopped", rank)

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._prefix}/{topic}/{rank}"
