"""The matrix kernel of the CUDA target: tiles of ``A @ B.T`` whose operands are read through functions of an index.

One thread block computes one tile. It copies a slice of both operands to registers, then to shared memory, and
multiplies from there while the next slice is on its way to registers, so that reading global memory overlaps with
arithmetic. The functions that read the operands may follow an index (the rows of a token, the matrix of an expert):
a slice in shared memory is the same either way.

A kernel is written in phases: each is a loop over the threads of the block, and what one leaves is read by the next.
TVM merges the loops into one kernel and puts barriers between phases that share memory. With thread loops turned into
plain ones (``serial.serial``) the same function runs on a CPU and computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from moeify.backends.tvm.cuda.tiles import FRAGMENT, WARP, BlockTile

_ALIGN = {"a": (16, 8), "b": (16, 8), "out": (16, 4)}  # rows start in different banks of shared memory


@dataclass(frozen=True)
class Operand:
    """``read(row, depth)`` gives a value, 0 for a row that there is not; it is called for depths inside the operand.

    ``vector`` neighbours ``along`` ("depth" or "row") are contiguous and aligned: one thread copies them at once.
    """

    read: Callable[[Any, Any], Any]
    vector: int
    along: str = "depth"


@dataclass(frozen=True)
class Product:
    """``tiles`` x ``columns`` tiles, one a thread block, of a product over ``depth``.

    ``left(t)`` and ``right(t, j)`` are the operands of tile ``t`` and block of columns ``j``. ``finish(t, j, row,
    column, sums)`` writes output ``column`` of the block in ``row`` of the tile, where ``sums(c)`` is the sum of column
    ``column * group + c``. ``used(t)`` is 1, or 0 for a tile with nothing to do.
    """

    tile: BlockTile
    dtype: str
    tiles: Any
    columns: Any
    depth: Any
    left: Callable[[Any], Operand]
    right: Callable[[Any, Any], Operand]
    finish: Callable[[Any, Any, Any, Any, Callable[[int], Any]], None]
    used: Callable[[Any], Any] | None = None
    group: int = 1

    def emit(self) -> None:
        """Add the kernel to the function that is being built."""
        x, y = B.thread_binding(self.tiles, thread="blockIdx.x"), B.thread_binding(self.columns, thread="blockIdx.y")
        # Whether there is something to do is a loop and not a condition: TVM puts no barrier into a condition.
        with x as t, y as j, B.serial(self.used(t) if self.used else 1), _block("tile"):
            self._tile(t, j)

    def _tile(self, t: Any, j: Any) -> None:
        tile, shared = self.tile, "shared.dyn" if self.tile.tensor_cores else "shared"
        left, right = self.left(t), self.right(t, j)
        copies = [
            _Copy(self, "a", left, tile.rows, self._memory(tile.rows, shared)),
            _Copy(self, "b", right, tile.columns, self._memory(tile.columns, shared)),
        ]
        a, b = (copy.memory for copy in copies)
        if tile.tensor_cores:
            sums = B.sblock_alloc_buffer((tile.rows, tile.columns), "float32", scope="wmma.accumulator")
        else:
            sums = B.sblock_alloc_buffer((tile.threads, tile.part_rows * tile.part_columns), "float32", scope="local")
        self._clear(sums)
        for copy in copies:
            copy.fetch(0)
        with B.serial((self.depth + tile.depth - 1) // tile.depth) as step:
            for copy in copies:
                copy.store()
            for copy in copies:
                copy.fetch((step + 1) * tile.depth)
            self._multiply(a, b, sums)
        self._finish(t, j, sums, shared)

    def _memory(self, rows: int, scope: str) -> Any:
        """A slice of an operand: by rows for tensor cores, by depth for threads that read neighbouring rows."""
        shape = (rows, self.tile.depth) if self.tile.tensor_cores else (self.tile.depth, rows)
        return B.sblock_alloc_buffer(shape, self.dtype, scope=scope)

    def _clear(self, sums: Any) -> None:
        if self.tile.tensor_cores:
            with self._warps() as (row, column), self._fragments() as (i, k):
                _fragment("clear", (), _part(sums, row + i, column + k), lambda u, v: T.float32(0))
        else:
            with threads(self.tile) as thread, B.serial(sums.shape[1]) as n:
                B.buffer_store(sums, T.float32(0), [thread, n])

    def _multiply(self, a: Any, b: Any, sums: Any) -> None:
        if not self.tile.tensor_cores:
            return self._multiply_scalar(a, b, sums)
        tile = self.tile
        with self._warps() as (row, column), B.unroll(tile.depth // FRAGMENT) as step:
            a_part = B.sblock_alloc_buffer((tile.rows, FRAGMENT), self.dtype, scope="wmma.matrix_a")
            b_part = B.sblock_alloc_buffer((tile.columns, FRAGMENT), self.dtype, scope="wmma.matrix_b")
            for name, source, target, first, size in (
                ("load_a", a, a_part, row, tile.part_rows),
                ("load_b", b, b_part, column, tile.part_columns),
            ):
                with B.unroll(size // FRAGMENT) as n:
                    start = first + n * FRAGMENT
                    _fragment(name, (_part(source, start, step * FRAGMENT),), _part(target, start, 0))
            with self._fragments() as (i, k):
                _multiply_fragment(
                    _part(a_part, row + i, 0), _part(b_part, column + k, 0), _part(sums, row + i, column + k)
                )

    def _multiply_scalar(self, a: Any, b: Any, sums: Any) -> None:
        tile = self.tile
        with threads(tile) as thread:
            row, column = thread // tile.across * tile.part_rows, thread % tile.across * tile.part_columns
            with B.serial(tile.depth) as k, B.unroll(tile.part_rows) as i, B.unroll(tile.part_columns) as c:
                n = i * tile.part_columns + c
                B.buffer_store(sums, sums[thread, n] + a[k, row + i] * b[k, column + c], [thread, n])

    def _finish(self, t: Any, j: Any, sums: Any, shared: str) -> None:
        tile, group = self.tile, self.group
        if not tile.tensor_cores:
            with threads(tile) as thread, B.unroll(tile.part_rows) as i, B.unroll(tile.part_columns // group) as c:
                row = thread // tile.across * tile.part_rows + i
                column = thread % tile.across * (tile.part_columns // group) + c
                first = i * tile.part_columns + c * group
                self.finish(t, j, row, column, lambda g: sums[thread, first + g])
            return
        out = B.sblock_alloc_buffer((tile.rows, tile.columns), "float32", scope=shared)
        with self._warps() as (row, column), self._fragments() as (i, k), _aligned("leave", out, "out"):
            _fragment("store", (_part(sums, row + i, column + k),), _part(out, row + i, column + k))
        width = tile.columns // group
        with threads(tile) as thread, B.serial(tile.rows * width // tile.threads) as n:
            place = n * tile.threads + thread
            row, column = place // width, place % width
            self.finish(t, j, row, column, lambda g: out[row, column * group + g])

    @contextmanager
    def _warps(self) -> Any:
        """Over warps: the first row and column of the part that each holds."""
        tile = self.tile
        with B.thread_binding(tile.warps, thread="threadIdx.y") as warp:
            yield warp // tile.across * tile.part_rows, warp % tile.across * tile.part_columns

    @contextmanager
    def _fragments(self) -> Any:
        with B.unroll(self.tile.part_rows // FRAGMENT) as i, B.unroll(self.tile.part_columns // FRAGMENT) as k:
            yield i * FRAGMENT, k * FRAGMENT


class _Copy:
    """One operand's way into shared memory: global memory to registers, and a step later from there."""

    def __init__(self, product: Product, name: str, operand: Operand, rows: int, memory: Any) -> None:
        self.product, self.name, self.operand, self.rows, self.memory = product, name, operand, rows, memory
        tile, vector = product.tile, operand.vector
        self.groups = rows * tile.depth // vector // tile.threads
        assert self.groups * vector * tile.threads == rows * tile.depth, (tile, operand)
        self.staged = B.sblock_alloc_buffer((tile.threads, self.groups * vector), product.dtype, scope="local")

    def fetch(self, start: Any) -> None:
        """The slice from ``start`` on, to registers. Past the end of the depth it is zero."""
        with self._elements() as (thread, n, row, k):
            # The last slice may end inside a vector's row but never inside a vector: vectors divide the depth.
            inside = start + k < self.product.depth
            value = T.if_then_else(inside, self.operand.read(row, start + k), T.Cast(self.product.dtype, 0))
            B.buffer_store(self.staged, value, [thread, n])

    def store(self) -> None:
        """Registers to shared memory."""
        with _aligned("copy", self.memory, self.name), self._elements() as (thread, n, row, k):
            place = [row, k] if self.product.tile.tensor_cores else [k, row]
            B.buffer_store(self.memory, self.staged[thread, n], place)

    @contextmanager
    def _elements(self) -> Any:
        tile, vector = self.product.tile, self.operand.vector
        with threads(tile) as thread, B.unroll(self.groups) as n, B.vectorized(vector) as v:
            place = n * tile.threads + thread
            if self.operand.along == "depth":
                wide = tile.depth // vector
                row, k = place // wide, place % wide * vector + v
            else:
                wide = self.rows // vector
                k, row = place // wide, place % wide * vector + v
            yield thread, n * vector + v, row, k


@contextmanager
def threads(tile: BlockTile) -> Any:
    """A phase: the loop over the threads of a block."""
    warps, lanes = B.thread_binding(tile.warps, thread="threadIdx.y"), B.thread_binding(WARP, thread="threadIdx.x")
    with warps as warp, lanes as lane:
        yield warp * WARP + lane


@contextmanager
def _block(name: str) -> Any:
    with B.sblock(name):
        B.reads()
        B.writes()
        yield


@contextmanager
def _aligned(name: str, buffer: Any, which: str) -> Any:
    """A block that writes shared memory whose rows are padded."""
    factor, offset = _ALIGN[which]
    with B.sblock(name):
        B.reads()
        B.writes(buffer[0 : buffer.shape[0], 0 : buffer.shape[1]])
        B.sblock_attr({"buffer_dim_align": [[0, 0, factor, offset]]})
        yield


def _part(buffer: Any, row: Any, column: Any) -> tuple[Any, Any, Any]:
    return buffer, row, column


def _region(part: tuple[Any, Any, Any]) -> Any:
    buffer, row, column = part
    return buffer[row : row + FRAGMENT, column : column + FRAGMENT]


def _fragment(name: str, sources: tuple[Any, ...], target: Any, value: Any = None) -> None:
    """A copy of 16 x 16 values, in a block that ``tensor_cores`` knows by its name."""
    with B.sblock(f"wmma_{name}"):
        B.reads(*(_region(source) for source in sources))
        B.writes(_region(target))
        with B.serial(FRAGMENT) as u, B.serial(FRAGMENT) as v:
            if value is None:
                buffer, row, column = sources[0]
                copied = buffer[row + u, column + v]
            else:
                copied = value(u, v)
            B.buffer_store(target[0], copied, [target[1] + u, target[2] + v])


def _multiply_fragment(a: Any, b: Any, sums: Any) -> None:
    with B.sblock("wmma_multiply"):
        B.reads(_region(sums), _region(a), _region(b))
        B.writes(_region(sums))
        with B.serial(FRAGMENT) as u, B.serial(FRAGMENT) as v, B.serial(FRAGMENT) as k:
            place = [sums[1] + u, sums[2] + v]
            left, right = a[0][a[1] + u, a[2] + k], b[0][b[1] + v, b[2] + k]
            B.buffer_store(sums[0], sums[0][*place] + T.Cast("float32", left) * T.Cast("float32", right), place)
