"""Passes over one row: vectors of a fixed number of lanes, sums and maxima held lane by lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

Combine = Callable[[Any, Any], Any]


def vectors(width: Any, lanes: int, emit: Callable[[Any, int], None]) -> None:
    """Cover ``width`` columns: ``emit(start, lanes)`` for each whole vector, then for what is left.

    That is one shorter vector where the width is a number, and single columns where it is an expression.
    """
    if isinstance(width, int):
        full, rest = divmod(width, lanes)
        if full:
            with T.serial(0, full) as v:
                emit(v * lanes, lanes)
        if rest:
            emit(full * lanes, rest)
        return
    full = T.bind(tirx.floordiv(width, lanes))
    with T.serial(0, full) as v:
        emit(v * lanes, lanes)
    with T.serial(full * lanes, width) as column:
        emit(column, 1)


class Lanes:
    """A sum or maximum held lane by lane: each lane has every ``lanes``-th column."""

    def __init__(self, lanes: int, first: float, combine: Combine) -> None:
        self.lanes = lanes
        self.combine = combine
        self._buffer = T.alloc_buffer((lanes,), "float32")
        with T.vectorized(0, lanes) as j:
            T.buffer_store(self._buffer, tirx.const(first, "float32"), [j])

    def add(self, value: Callable[[Any], Any], lanes: int) -> None:
        """Take in ``value(lane)`` of the first ``lanes`` lanes."""
        with T.vectorized(0, lanes) as j:
            T.buffer_store(self._buffer, self.combine(self._buffer[j], value(j)), [j])

    def result(self) -> Any:
        """All lanes in one, by halves. Ends the use of this object."""
        lanes = self.lanes
        while lanes > 1:
            half = lanes // 2
            assert 2 * half == lanes, "the lanes of a register tile are a power of two"
            with T.vectorized(0, half) as j:
                T.buffer_store(self._buffer, self.combine(self._buffer[j], self._buffer[j + half]), [j])
            lanes = half
        return T.bind(self._buffer[0])


def add(a: Any, b: Any) -> Any:
    return a + b


def each(lanes: int, emit: Callable[[Any], None]) -> None:
    """``emit(lane)`` of a vector."""
    with T.vectorized(0, lanes) as j:
        emit(j)
