"""Errors of a collective, translated: which rank is to blame, in which block, and what to do.

The connections of a rank that ends close, its peers fail, end, and take theirs along. So the first error of a rank does
not tell who is to blame. A rank that fails raises an alarm; whoever waits in an exchange answers it, which a rank that
has ended or that hangs does not. The first rank that knows writes it to the board, and all say the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moeify.distributed.board import Blame, Board
from moeify.distributed.groups import named
from moeify.errors import DistributedError, MoeifyError, NonFiniteValues, RankLost, RanksDiffer

LOOK = 1.0  # seconds between looks at the board of a rank that waits in an exchange
_ANSWERS = 10.0  # seconds for those that wait in the same exchange to answer an alarm
_TIMED_OUT = ("timed out",)
_CLOSED = ("connection closed", "connection reset", "connection refused", "pair closure", "broken pipe")
_SHARED = (RankLost, RanksDiffer, NonFiniteValues)  # all ranks raise these
_FROM_LAST = "and start again from the last checkpoint"
_STORE_GONE = Blame(
    (),
    "the process that holds the ranks' store has ended: rank 0, or torchrun where that started the ranks",
    f"look at the log of rank 0, {_FROM_LAST}",
)


def explain(
    error: BaseException, board: Board, rank: int, ranks: Sequence[int], where: str, seconds: float
) -> Exception:
    """What to raise in the place of the runtime's error. ``ranks`` are those of the group, ``rank`` this one.

    Takes until all ranks but one have answered, at most another ``seconds``: two ranks that ended look like two that
    still compute.
    """
    if isinstance(error, DistributedError):
        return error
    text = str(error).lower()
    others = [other for other in ranks if other != rank]
    board.raise_alarm()
    board.put("waiting", rank, where)
    if any(sign in text for sign in _TIMED_OUT):
        waiting = board.wait("waiting", others, _ANSWERS, spare=1)
        blame = _too_late(waiting, others, where, seconds)
    elif any(sign in text for sign in _CLOSED):
        waiting = board.wait("waiting", others, seconds, spare=1)
        blame = _ended(waiting, others)
    else:
        what = f"rank {rank} failed in an exchange: {str(error).splitlines()[0]}"
        blame = Blame((rank,), what, "look at the logs of the other ranks for the first error")
    if board.gone:
        blame = _STORE_GONE
    return _lost(board.blame(blame), board, rank, where)


def heed(board: Board, rank: int, where: str) -> None:
    """What a rank does while it waits in an exchange: it answers an alarm, and raises RankLost when the run ends."""
    if (blame := board.blamed()) is not None:
        raise _lost(blame, board, rank, where)
    if board.alarmed():
        board.put("waiting", rank, where)


@contextmanager
def answering(board: Board, rank: int, where: str) -> Iterator[None]:
    """While this lasts, a thread answers alarms: for collectives that are not ours and look at no board."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK):
            if board.alarmed():
                board.put("waiting", rank, where)
                return

    thread = threading.Thread(target=look, name="moeify-answering", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def not_come(board: Board, ranks: Sequence[int], to: str, seconds: float) -> Blame:
    """Why these ranks have left no note of what they were to come to."""
    if board.gone:
        return _STORE_GONE
    blame = Blame(
        tuple(ranks), f"{named(ranks)} did not come to {to} within {seconds:g} s", f"look at the log of {named(ranks)}"
    )
    return board.blame(blame)


@contextmanager
def telling(board: Board, rank: int) -> Iterator[None]:
    """An error of this rank ends the others too: they hear why."""
    try:
        yield
    except _SHARED:
        raise
    except Exception as error:
        board.stop(rank, error.what if isinstance(error, MoeifyError) else f"{type(error).__name__}: {error}")
        board.leave(rank)
        raise


def _lost(blame: Blame, board: Board, rank: int, where: str) -> RankLost:
    board.leave(rank)
    return RankLost(blame.what, where=where, hint=blame.hint)


def _ended(waiting: dict[int, str], others: Sequence[int]) -> Blame:
    absent = tuple(other for other in others if other not in waiting)
    if not absent:
        return Blame((), "a connection between the ranks broke, and none of them has ended", "look at the network")
    return Blame(
        absent, f"{named(absent)} ended during an exchange", f"look at the log of {named(absent)}, {_FROM_LAST}"
    )


def _too_late(waiting: dict[int, str], others: Sequence[int], where: str, seconds: float) -> Blame:
    absent = tuple(other for other in others if other not in waiting)
    if absent:
        what = f"{named(absent)} did not come to an exchange within {seconds:g} s"
        return Blame(absent, what, f"see what {named(absent)} was doing, or give bind a longer timeout")
    elsewhere = {other: block for other, block in waiting.items() if block != where}
    if elsewhere:
        other, block = next(iter(elsewhere.items()))
        what = f"the ranks are in different exchanges: some at {where}, rank {other} at {block}"
        return Blame((), what, "every rank must call the model equally often")
    what = f"an exchange took more than {seconds:g} s, and every rank was in it"
    return Blame((), what, "give bind a longer timeout, or look at the network")
