"""Who is to blame when an exchange fails, from the notes that the ranks have left."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from moeify.distributed.board import Blame, Board
from moeify.distributed.lost import explain, heed, not_come, telling
from moeify.errors import BadOption, RankLost, RanksDiffer

CLOSED = "[pair.cc:553] Connection closed by peer [127.0.0.1]:21679"
LATE = "Operation timed out!"


@pytest.fixture
def board(request: pytest.FixtureRequest) -> Board:
    return Board(dist.HashStore(), request.node.name)


def said(board: Board, error: str, seconds: float = 0.3) -> str:
    """By rank 0 of 4, in an exchange of layers.1."""
    return str(explain(RuntimeError(error), board, 0, range(4), "layers.1", seconds))


def test_a_rank_that_only_lost_the_others_is_not_blamed(board: Board) -> None:
    """Rank 1 has failed too, rank 3 waits for another exchange; the first of them has found out about rank 2."""
    board.put("waiting", 1, "layers.1")
    board.put("waiting", 3, "layers.0")
    first = said(board, CLOSED)
    assert first.startswith("rank 2 ended during an exchange\n  at: layers.1\n")
    other = explain(RuntimeError(LATE), board, 3, range(4), "layers.0", 0.3)
    assert str(other) == first.replace("layers.1", "layers.0")
    with pytest.raises(RankLost, match="rank 2 ended during an exchange"):
        heed(board, 1, "layers.1")


def test_the_first_reason_stays(board: Board) -> None:
    board.stop(3, "the data ended")
    board.stop(1, "no more")
    assert not_come(board, [2], "bind", 3).what == "rank 3 stopped: the data ended"
    assert said(board, CLOSED).startswith("rank 3 stopped: the data ended\n")


def test_who_waits_answers_an_alarm(board: Board) -> None:
    heed(board, 1, "layers.1")
    assert board.get("waiting", 1) is None
    board.raise_alarm()
    heed(board, 1, "layers.1")
    assert board.get("waiting", 1) == "layers.1"


ALL_THERE = {
    "a connection that broke": (CLOSED, "layers.1", "a connection between the ranks broke, and none of them has ended"),
    "a slow exchange": (LATE, "layers.1", "an exchange took more than 0.3 s, and every rank was in it"),
    "different exchanges": (
        LATE,
        "layers.0",
        "the ranks are in different exchanges: some at layers.1, rank 3 at layers.0",
    ),
    "what is not known": ("no such device\nframe 1", "layers.1", "rank 0 failed in an exchange: no such device"),
}


@pytest.mark.parametrize("case", ALL_THERE)
def test_with_all_ranks_there(board: Board, case: str) -> None:
    error, where, text = ALL_THERE[case]
    for rank in (1, 2):
        board.put("waiting", rank, "layers.1")
    board.put("waiting", 3, where)
    assert said(board, error).startswith(f"{text}\n  at: layers.1\n  hint: ")


def test_an_error_of_one_rank_is_told_and_one_that_all_raise_is_not(board: Board) -> None:
    with pytest.raises(RanksDiffer), telling(board, 1):
        raise RanksDiffer("top-k is 2 on rank 0 and 1 on rank 1")
    assert board.blamed() is None
    with pytest.raises(BadOption), telling(board, 1):
        raise BadOption("there is no mode 'none'", hint="choose dropless")
    assert board.blamed() == Blame((1,), "rank 1 stopped: there is no mode 'none'", "cure rank 1 and start again")


def test_a_new_run_does_not_see_the_notes_of_the_last(board: Board) -> None:
    board.turn(0)
    board.stop(1, "no more")
    board.begin()
    assert (board.blamed(), board.turn(0)) == (None, 1)


def test_a_store_that_is_gone_is_asked_once() -> None:
    class Gone(dist.Store):
        asked = 0

        def check(self, keys):
            Gone.asked += 1
            raise dist.DistNetworkError("Broken pipe")

        def set(self, key, value):
            return self.check([key])

    board = Board(Gone())
    assert said(board, CLOSED).startswith("the process that holds the ranks' store has ended: rank 0, or torchrun")
    assert Gone.asked == 1
