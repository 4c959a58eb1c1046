"""Work that every rank does by itself: either it is done on all of them, or all of them raise the same error.

The ranks tell each other over the board, as in the handshake: a rank that has failed is in no state for a collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

from moeify.distributed.groups import Groups
from moeify.distributed.lost import not_come
from moeify.errors import (
    MoeifyError,
    NonFiniteWeights,
    OutputNotWritten,
    RankLost,
    RanksDiffer,
    StateDictMismatch,
    UnreadableFile,
    UsageError,
)

T = TypeVar("T")
_MARGIN = 5.0  # seconds that the verdict may come later than the last note
_ERRORS: Mapping[str, type[MoeifyError]] = {
    error.__name__: error
    for error in (
        NonFiniteWeights, OutputNotWritten, RankLost, RanksDiffer, StateDictMismatch, UnreadableFile, UsageError,
    )
}  # fmt: skip
_Note = dict[str, str | None]  # {"made": text}, or kind, what, where and hint of an error
_ALL_WELL: _Note = {}
_EACH_ITS_OWN: _Note = {"kind": None}  # all have failed alike


def agreed(groups: Groups, where: str, work: Callable[[], T], alike: Callable[[T], str] = lambda made: "") -> T:
    """What ``work`` returns here, once it is done on all ranks. Every rank of the mesh calls it.

    ``alike`` of the result must be the same text on every rank. ``where`` names the work in errors.

    Raises the same on every rank: what they raised where all failed alike, else the error of the first that failed,
    with the number of that rank, and RankLost in the place of an exception that is not moeify's; RankLost too for a
    rank that is not done within ``groups.seconds`` of the first one; RanksDiffer for results that are not alike.
    """
    number = groups.board.turn(groups.rank)
    cause: Exception | None = None
    note: _Note
    try:
        made = work()
        note = {"made": alike(made)}
    except Exception as error:
        cause, note = error, _note(error, where)
    verdict = _shared(note, groups, number, where)
    if verdict == _ALL_WELL:
        return made
    groups.board.leave(groups.rank)
    if verdict == _EACH_ITS_OWN and cause is not None:
        raise cause
    raise _ERRORS[str(verdict["kind"])](str(verdict["what"]), where=verdict["where"], hint=verdict["hint"]) from cause


def _shared(mine: _Note, groups: Groups, number: int, where: str) -> _Note:
    """The first rank reads all notes and writes the verdict. ``number`` is that of this meeting."""
    board, leader = groups.board, groups.ranks[0]
    if groups.size == 1:
        return _verdict({groups.rank: mine})
    board.put(f"done-{number}", groups.rank, json.dumps(mine))
    if groups.rank == leader:
        found = board.wait(f"done-{number}", groups.ranks, groups.seconds)
        missing = [rank for rank in groups.ranks if rank not in found]
        notes = {rank: json.loads(found[rank]) for rank in groups.ranks if rank in found}
        verdict = _lost(groups, missing, where) if missing else _verdict(notes)
        board.put(f"agreed-{number}", leader, json.dumps(verdict))
        return verdict
    # The first rank waits for the others from when it has come itself.
    came = board.wait(f"done-{number}", [leader], groups.seconds)
    answer = board.wait(f"agreed-{number}", [leader], groups.seconds + _MARGIN) if came else {}
    return json.loads(answer[leader]) if answer else _lost(groups, [leader], where)


def _verdict(notes: Mapping[int, _Note]) -> _Note:
    failed = {rank: note for rank, note in notes.items() if "made" not in note}
    if failed:
        rank, first = next(iter(failed.items()))
        if all(note == first for note in notes.values()):
            return _EACH_ITS_OWN
        places = [str(first["where"])] if first["where"] else []
        return {**first, "where": ", ".join([*places, f"rank {rank}"])}
    rank, first = next(iter(notes.items()))
    other = next((other for other, note in notes.items() if note != first), None)
    if other is None:
        return _ALL_WELL
    what = f"the ranks do not agree: {first['made']} on rank {rank} and {notes[other]['made']} on rank {other}"
    return _error(RanksDiffer, what, None, "give every rank the same files and options")


def _note(error: Exception, where: str) -> _Note:
    if isinstance(error, MoeifyError) and type(error).__name__ in _ERRORS:
        return _error(type(error), error.what, error.where, error.hint)
    return _error(RankLost, f"{type(error).__name__}: {error}", where, "look at the log of that rank")


def _lost(groups: Groups, ranks: list[int], where: str) -> _Note:
    blame = not_come(groups.board, ranks, f"the end of the {where}", groups.seconds)
    return _error(RankLost, blame.what, where, blame.hint)


def _error(kind: type[MoeifyError], what: str, where: str | None, hint: str | None) -> _Note:
    return {"kind": kind.__name__, "what": what, "where": where, "hint": hint}
