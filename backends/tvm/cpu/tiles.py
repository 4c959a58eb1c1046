"""The register tile: a few rows times one panel of packed columns, summed in registers.

Source of method: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34 (2008). The
kernels are built with TVM's IR builder and not its script, because each number of rows has its own unrolled code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.machine import Machine

# Index -> value at (row of the tile, column of the panel).
At = Callable[[int, Any], Any]


class Sums:
    """The sums of one tile, a buffer a row: LLVM keeps them in registers.

    TVM puts a buffer of at most 1024 bytes and of "global" scope on the stack; one of "local" scope it asks of its
    runtime, which takes a lock of an arena for each.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns
        self._buffers = [T.alloc_buffer((columns,), "float32") for _ in range(rows)]

    def __getitem__(self, at: tuple[int, Any]) -> Any:
        return self._buffers[at[0]][at[1]]

    def set(self, value: At) -> None:
        """Every sum becomes ``value(row, column)``."""
        for i, buffer in enumerate(self._buffers):
            with T.vectorized(0, self.columns) as j:
                T.buffer_store(buffer, value(i, j), [j])

    def multiply_add(self, left: Callable[[int], Any], right: Callable[[Any], Any]) -> None:
        """Every sum grows by ``left(row) * right(column)``. The product is fused with the sum by LLVM."""
        for i, buffer in enumerate(self._buffers):
            with T.vectorized(0, self.columns) as j:
                T.buffer_store(buffer, buffer[j] + left(i) * right(j), [j])

    def store(self, buffer: Any, row: Any, column: Any, width: int) -> None:
        """Write ``width`` columns of the tile to ``buffer[row + i, column + j]``."""
        for i in range(self.rows):
            with T.vectorized(0, width) as j:
                T.buffer_store(buffer, self[i, j], [row + i, column + j])


def row_tiles(first: Any, last: Any, rows: int, emit: Callable[[Any, int], None]) -> None:
    """Cover the rows ``first`` to ``last`` (not included) by tiles: ``emit(start, rows)`` makes the code of each.

    The rest below ``rows`` has exact code: one for each number of rows where those are few, and by powers of two
    where ``rows`` is large, to keep the code small.
    """
    count = T.bind(tirx.floordiv(last - first, rows))
    with T.serial(0, count) as t:
        emit(first + t * rows, rows)
    start = T.bind(first + count * rows)
    rest = T.bind(last - start)
    if rows <= 8:
        for n in range(1, rows):
            with T.If(rest == n), T.Then():
                emit(start, n)
        return
    n = 1 << (rows - 1).bit_length() - 1
    while n:
        with T.If(tirx.floormod(tirx.floordiv(rest, n), 2) == 1), T.Then():
            emit(start + rest - tirx.floormod(rest, 2 * n), n)
        n //= 2


def few_row_tiles(first: Any, last: Any, rows: int, emit: Callable[[Any, int], None]) -> None:
    """As ``row_tiles``, with code for three numbers of rows only: for tiles whose code is long."""
    start = first
    for n in sorted({rows, max(rows // 2, 1), 1}, reverse=True):
        count = T.bind(tirx.floordiv(last - start, n))
        with T.serial(0, count) as t:
            emit(start + t * n, n)
        start = T.bind(start + count * n)


def shares(tasks: int, machine: Machine) -> int:
    """Into how many shares each of ``tasks`` tasks is cut, so that every core has some and they end together."""
    cores = int(machine.target.attrs["num-cores"]) if "num-cores" in machine.target.attrs else 1
    return 1 if cores == 1 or tasks >= 4 * cores else -(-4 * cores // tasks)


def share(rows: Any, index: Any, count: int, tile: int) -> tuple[Any, Any]:
    """The first row of share ``index`` of ``count`` and the row after its last: whole tiles, as even as they go."""
    if count == 1:
        return tirx.const(0, "int64"), rows
    tiles = tirx.floordiv(rows + (tile - 1), tile)

    def bound(index: Any) -> Any:
        return T.bind(tirx.min(tirx.floordiv(tiles * index, count) * tile, rows))

    return bound(index), bound(index + 1)
