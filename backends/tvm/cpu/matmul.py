"""The product of two computed tensors: panels of the right one packed as they are used, threads over panels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.tiles import Sums, row_tiles
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.machine import Tile
from moeify.backends.tvm.sizes import broadcast, in_kernel, same_size, spelled
from moeify.backends.tvm.types import tensor_type


def matmul(emitter: Emitter, a: Any, b: Any) -> Any:
    """``a [..., M, K] @ b [..., K, N]`` in float32, leading sizes equal, 1 or absent. Gives None for other cases."""
    left, right = shape_of(a), shape_of(b)
    if dtype_of(a) != "float32" or dtype_of(b) != "float32" or min(len(left), len(right)) < 2:
        return None
    leading = broadcast(left[:-2], right[:-2])
    if leading is None or not same_size(left[-1], right[-2]):
        return None
    out = [*leading, left[-2], right[-1]]
    tile = emitter.machine.tile
    name = f"matmul_{spelled(left)}_{spelled(right)}"
    kernel = emitter.kernel(name, lambda: make(left, right, out, tile))
    return emitter.call(kernel, [a, b], tensor_type(out, "float32"))


def make(left: list[Any], right: list[Any], out: list[Any], tile: Tile) -> tirx.PrimFunc:
    """``(a, b, y)``. Only which sizes are numbers, and those numbers, matter of the shapes."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("a", "b", "y")]
        a = T.match_buffer(handles[0], in_kernel(left), "float32")
        b = T.match_buffer(handles[1], in_kernel(right), "float32")
        y = T.match_buffer(handles[2], in_kernel(out), "float32")
        depth, rows, width = a.shape[-1], y.shape[-2], y.shape[-1]
        panels = tirx.floordiv(width + (tile.columns - 1), tile.columns)
        batch = 1
        for size in y.shape[:-2]:
            batch = batch * size
        with T.parallel(0, batch * panels) as task:
            panel = T.bind(tirx.floormod(task, panels))
            at = unravelled(tirx.floordiv(task, panels), list(y.shape[:-2]))
            pack = T.alloc_buffer((depth, tile.columns), "float32")
            start = T.bind(panel * tile.columns)
            whole = start + tile.columns <= width
            right_at = broadcast_at(at, right)
            with T.serial(0, depth) as k, T.If(whole):
                with T.Then(), T.vectorized(0, tile.columns) as j:
                    T.buffer_store(pack, b[(*right_at, k, start + j)], [k, j])
                with T.Else(), T.serial(0, tile.columns) as j:
                    inside = tirx.if_then_else(start + j < width, b[(*right_at, k, start + j)], _ZERO)
                    T.buffer_store(pack, inside, [k, j])
            left_at = broadcast_at(at, left)

            def emit(row: Any, n: int) -> None:
                sums = Sums(n, tile.columns)
                sums.set(lambda i, j: _ZERO)
                with T.serial(0, depth) as k:
                    sums.multiply_add(lambda i: a[(*left_at, row + i, k)], lambda j: pack[k, j])
                write(sums, start, width, lambda i, j, value: T.buffer_store(y, value, [*at, row + i, j]))

            row_tiles(tirx.const(0, "int64"), rows, tile.rows, emit)
    return builder.get()


_ZERO = tirx.const(0.0, "float32")


def write(sums: Sums, start: Any, width: Any, store: Callable[[int, Any, Any], None]) -> None:
    """``store(row, column, sum)`` for every column from ``start`` that is below ``width``."""
    with T.If(start + sums.columns <= width):
        with T.Then():
            for i in range(sums.rows):
                with T.vectorized(0, sums.columns) as j:
                    store(i, start + j, sums[i, j])
        with T.Else():
            for i in range(sums.rows):
                with T.serial(0, width - start) as j:
                    store(i, start + j, sums[i, j])


def unravelled(index: Any, sizes: list[Any]) -> list[Any]:
    """The position in a tensor of these sizes of a flat index."""
    at: list[Any] = []
    for size in reversed(sizes):
        at.insert(0, T.bind(tirx.floormod(index, size)))
        index = tirx.floordiv(index, size)
    return at


def broadcast_at(at: list[Any], shape: list[Any]) -> list[Any]:
    """Where to read a tensor whose leading sizes (all but two) are 1 or absent where they are broadcast."""
    leading = shape[:-2]
    return [0 if size == 1 else i for size, i in zip(leading, at[len(at) - len(leading) :], strict=True)]
