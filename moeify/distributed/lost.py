"""Errors of a collective, translated: which rank is missing, in which block, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from moeify.distributed.board import Board
from moeify.errors import DistributedError, RankLost

_GRACE = 2.0  # seconds for the other survivors to say that they were there
_TIMED_OUT = ("timed out",)
_CLOSED = ("connection closed", "connection reset", "connection refused", "pair closure", "broken pipe", "barrier")


def explain(
    error: BaseException, board: Board, rank: int, ranks: Sequence[int], where: str, seconds: float
) -> Exception:
    """What to raise in the place of the runtime's error. ``ranks`` are those of the group, ``rank`` this one.

    Every survivor notes that it was in this exchange; the ranks without a note are the ones to blame.
    """
    if isinstance(error, DistributedError):
        return error
    text = str(error).lower()
    if not any(sign in text for sign in (*_TIMED_OUT, *_CLOSED)):
        return RankLost(
            f"rank {rank} failed in an exchange: {str(error).splitlines()[0]}",
            where=where,
            hint="look at the logs of the other ranks for the first error",
        )
    board.put("waiting", rank, where)
    others = [other for other in ranks if other != rank]
    waiting = board.wait("waiting", others, _GRACE)
    reasons = {other: why for other in others if (why := board.why_stopped(other)) is not None}
    if reasons:
        first, why = next(iter(reasons.items()))
        return RankLost(f"rank {first} stopped: {why}", where=where, hint=f"cure rank {first} and start again")
    absent = [other for other in others if other not in waiting]
    elsewhere = {other: block for other, block in waiting.items() if block != where}
    if elsewhere:
        other, block = next(iter(elsewhere.items()))
        return RankLost(
            f"rank {rank} and rank {other} are in different exchanges: {other} is at {block}",
            where=where,
            hint="every rank must call the model equally often",
        )
    if any(sign in text for sign in _TIMED_OUT):
        what = f"{_named(absent)} did not come to an exchange within {seconds:g} s"
        hint = f"see what {_named(absent)} was doing, or give bind a longer timeout"
    else:
        what = f"{_named(absent)} ended during an exchange"
        hint = f"look at the log of {_named(absent)}, and start again from the last checkpoint"
    return RankLost(what, where=where, hint=hint)


def _named(ranks: Sequence[int]) -> str:
    if not ranks:
        return "a rank"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
