"""A place where ranks leave notes for each other outside of collectives: who came, and who is to blame for an end.

A collective that fails says little and takes the connection with it. The store of ``torch.distributed`` still answers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

# Seconds between looks at the board. A wait of the store's own writes a warning to stderr when it times out.
_SLICE = 0.05
_FAREWELL = 30.0  # seconds that the process with the store stays for ranks that have not heard yet

# Of the process, since a mesh may get a board twice over one store. Every rank asks equally often.
_RUNS: Counter[str] = Counter()
_TURNS: Counter[tuple[str, int]] = Counter()


@dataclass(frozen=True)
class Blame:
    """Why a run ends: the ranks that are the cause, none where it is none of them, and the text for all."""

    ranks: tuple[int, ...]
    what: str
    hint: str


class Board:
    """Notes by (topic, rank) in a ``torch.distributed`` store. What the store cannot answer is an absent note.

    ``members`` are the ranks that use it; ``serves`` says that the store ends with this process. ``gone`` is True once
    it does not answer any more.
    """

    def __init__(
        self, store: dist.Store, prefix: str = "moeify", members: Sequence[int] = (), *, serves: bool = False
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._members = members
        self._serves = serves
        self.gone = False

    def begin(self) -> None:
        """Leave all notes of this process's boards with this prefix behind: those of a run that failed are not ours.

        Every rank calls it equally often.
        """
        _RUNS[self._prefix] += 1

    def turn(self, rank: int) -> int:
        """How often this rank has asked in this run: a number that tells one meeting of the ranks from the next."""
        _TURNS[self._place, rank] += 1
        return _TURNS[self._place, rank]

    def put(self, topic: str, rank: int, text: str) -> None:
        """Leave a note. A store that is gone, with the process that held it, takes none."""
        self._ask(lambda: self._store.set(self._key(topic, rank), text))

    def get(self, topic: str, rank: int) -> str | None:
        """A note that is there now, or None."""
        return self._read(self._key(topic, rank))

    def wait(self, topic: str, ranks: Sequence[int], seconds: float, *, spare: int = 0) -> dict[int, str]:
        """The notes of these ranks that come in time; earlier when all but ``spare`` of them have come, or when
        somebody is to blame."""
        return self._wait(topic, ranks, seconds, spare, lambda: self.blamed() is not None)

    def blame(self, blame: Blame) -> Blame:
        """Say why the run ends. The first to say it is right for all: what all ranks are to tell comes back."""
        text = json.dumps(asdict(blame))
        said = self._ask(lambda: self._store.compare_set(f"{self._place}/blame", "", text))
        return _blame(said.decode()) if said else blame

    def blamed(self) -> Blame | None:
        """Why the run ends, if it does."""
        said = self._read(f"{self._place}/blame")
        return _blame(said) if said else None

    def stop(self, rank: int, why: str) -> None:
        """Say why this rank ends, for those that will wait for it in vain, before it does."""
        self.blame(Blame((rank,), f"rank {rank} stopped: {why}", f"cure rank {rank} and start again"))

    def raise_alarm(self) -> None:
        """Ask every rank that waits in an exchange to say so now."""
        self._ask(lambda: self._store.set(f"{self._place}/alarm", "raised"))

    def alarmed(self) -> bool:
        return self._read(f"{self._place}/alarm") is not None

    def leave(self, rank: int) -> None:
        """Note that this rank knows why the run ends. The one with the store keeps it for those that do not know yet,
        but for the one to blame."""
        self.put("left", rank, "yes")
        if self._serves:
            blame = self.blamed()
            others = [other for other in self._members if blame is None or other not in blame.ranks]
            self._wait("left", others, _FAREWELL, 0, lambda: False)

    def _wait(
        self, topic: str, ranks: Sequence[int], seconds: float, spare: int, over: Callable[[], bool]
    ) -> dict[int, str]:
        deadline = time.monotonic() + seconds
        found: dict[int, str] = {}
        while True:
            left = deadline - time.monotonic()
            last = left <= 0 or self.gone or over()  # before the notes are read: one may come before the blame does
            missing = [rank for rank in ranks if rank not in found]
            found |= {rank: text for rank in missing if (text := self.get(topic, rank)) is not None}
            missing = [rank for rank in missing if rank not in found]
            if last or len(missing) <= spare:
                return {rank: found[rank] for rank in ranks if rank in found}
            time.sleep(min(left, _SLICE))

    def _read(self, key: str) -> str | None:
        text = self._ask(lambda: self._store.get(key) if self._store.check([key]) else None)
        return None if text is None else text.decode()

    def _ask(self, question: Callable[[], bytes | None]) -> bytes | None:
        # A store that is gone writes a trace to stderr at every question.
        if self.gone:
            return None
        try:
            return question()
        except (RuntimeError, OSError):  # torch's DistError is a RuntimeError
            self.gone = True
            return None

    @property
    def _place(self) -> str:
        return f"{self._prefix}/{_RUNS[self._prefix]}"

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._place}/{topic}/{rank}"


def _blame(text: str) -> Blame:
    found = json.loads(text)
    return Blame(tuple(found["ranks"]), found["what"], found["hint"])
