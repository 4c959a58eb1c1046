"""The user's data in three parts: fitted to, chosen by, and measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moeify.data.examples import Batch, Data
from moeify.errors import BadInputSpec
from moeify.ir.profile import Profile

CHOOSE = 2048  # rows of a block that the estimate of what blocks are worth is made on
_AT_ONCE = 512  # rows
_CHOOSE_SHARE, _TEST_SHARE = 1 / 10, 1 / 5  # of data that are fewer than is wanted

Rows = Callable[[Batch], float]  # how many rows a batch makes in a block


@dataclass(frozen=True)
class Wanted:
    """Rows of a block, at most, to the next whole batch."""

    fit: int
    choose: int
    test: int


@dataclass(frozen=True)
class Parts:
    """Batches by what they are for; none is in two of them. ``tested`` says where those of the test are from."""

    fit: list[Batch]
    choose: list[Batch]
    test: list[Batch]
    tested: str


def cut(data: Data, test: Data | None, rows: Rows, wanted: Wanted) -> Parts:
    """Batches in the order in which ``moeify convert`` reads them: those to fit to come first.

    Where there are fewer than is wanted, a fifth is tested on (none with ``test``), a tenth chosen by, and the rest
    fitted to. Raises BadInputSpec for data that make no three parts.
    """
    own = 0 if test is not None else wanted.test
    batches = _read(data.batches, rows, wanted.fit + wanted.choose + own)
    have = sum(map(rows, batches))
    scarce = have < wanted.fit + wanted.choose + own
    for_test = min(own, have * _TEST_SHARE) if scarce else own
    for_choice = min(wanted.choose, have * _CHOOSE_SHARE) if scarce else wanted.choose
    rest, held = _from_the_end(batches, rows, for_test)
    fit, choose = _from_the_end(rest, rows, for_choice)
    if test is not None:
        held, tested = _read(test.batches, rows, wanted.test), test.source
    else:
        tested = f"{sum(map(rows, held)):.0f} tokens of {data.source}"
    _check(data.source, len(batches), have, {"fit to": fit, "choose by": choose, "test on": held})
    return Parts(fit, choose, held, tested)


def beside(profile: Profile, source: str, data: Data, test: Data | None, rows: Rows, wanted: Wanted) -> Parts:
    """The same where a profile was made before: what it has run is fitted to, and what else there is in the data is
    chosen by and tested on.
    """
    seen = {key for batch in profile.batches for key in _keys(batch)}
    fresh = (batch for batch in data.batches if seen.isdisjoint(_keys(batch)))
    own = 0 if test is not None else wanted.test
    batches = _read(fresh, rows, wanted.choose + own)
    have = sum(map(rows, batches))
    for_choice = min(wanted.choose, have / 3) if own else wanted.choose
    held, choose = _from_the_end(batches, rows, for_choice)
    if test is not None:
        choose, held, tested = batches, _read(test.batches, rows, wanted.test), test.source
    else:
        tested = f"{sum(map(rows, held)):.0f} tokens of {data.source} that are not in {source}"
    _check(f"{data.source}, without what {source} has seen", len(batches), have, {"choose by": choose, "test on": held})
    return Parts(list(profile.batches), choose, held, tested)


def smaller(batches: Sequence[Batch], rows: Rows, wanted: float) -> list[Batch]:
    """The examples of the batches, as many as make the rows that are wanted, a few at a time.

    A batch that is fine to run can be too large to take gradients of, or to compare outputs in float64: a language
    model gives a score for every word at every row.
    """
    found: list[Batch] = []
    have = 0.0
    for batch in batches:
        size = max(1, int(len(batch[0]) * _AT_ONCE / rows(batch)))
        for start in range(0, len(batch[0]), size):
            if have < wanted:
                found.append(tuple(tensor[start : start + size] for tensor in batch))
                have += rows(found[-1])
    return found


def _read(batches: Iterable[Batch], rows: Rows, wanted: float) -> list[Batch]:
    found: list[Batch] = []
    have = 0.0
    for batch in batches:
        if have >= wanted:
            break
        found.append(batch)
        have += rows(batch)
    return found


def _from_the_end(batches: list[Batch], rows: Rows, wanted: float) -> tuple[list[Batch], list[Batch]]:
    """All but the last batches, and as many of the last as make the rows that are wanted."""
    at, have = len(batches), 0.0
    while at and have < wanted:
        at -= 1
        have += rows(batches[at])
    return batches[:at], batches[at:]


def _keys(batch: Batch) -> list[bytes]:
    """One for each example of a batch, the whole batch where its tensors have not one row per example."""
    tensors = [tensor.cpu().contiguous() for tensor in batch]
    counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    groups = list(zip(*tensors)) if len(counts) == 1 and counts != {0} else [tuple(tensors)]
    return [
        hashlib.sha256(b"".join(tensor.reshape(-1).numpy().tobytes() for tensor in group)).digest() for group in groups
    ]


def _check(source: str, count: int, have: float, parts: dict[str, Sequence[Batch]]) -> None:
    empty = [name for name, batches in parts.items() if not batches]
    if empty:
        raise BadInputSpec(
            f"{source}: {have:.0f} tokens in {count} {'batch' if count == 1 else 'batches'} leave none to {empty[0]}",
            hint=f"give data for at least {len(parts)} batches, or what to test on with --test",
        )
