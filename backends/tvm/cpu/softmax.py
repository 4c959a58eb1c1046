"""Softmax over the last axis, whose width may be known only when it runs."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.mathematics import exp
from moeify.backends.tvm.cpu.rowwise import Lanes, add, each, vectors
from moeify.backends.tvm.emitter import Emitter, dtype_of, rows, shape_of
from moeify.backends.tvm.types import tensor_type


def softmax(emitter: Emitter, x: Any) -> Any:
    """In float32, with the largest value subtracted first. Gives None for other types."""
    if dtype_of(x) != "float32":
        return None
    width = shape_of(x)[-1]
    lanes = emitter.machine.tile.columns
    known = width if isinstance(width, int) else None
    flat, leading = rows(emitter, x)
    name = f"softmax_{'any' if known is None else known}"
    kernel = emitter.kernel(name, lambda: make(known, lanes))
    y = emitter.call(kernel, [flat], tensor_type((flat.ty.shape.values[0], width), "float32"))
    return y if len(leading) == 1 else emitter.emit(relax.op.reshape(y, (*leading, width)))


def make(known: int | None, lanes: int) -> tirx.PrimFunc:
    """``(x [R, W], y [R, W])``; ``known`` is W where it is a number."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("x", "y")]
        count = T.int64()
        width = known if known is not None else T.int64()
        x = T.match_buffer(handles[0], (count, width), "float32")
        y = T.match_buffer(handles[1], (count, width), "float32")
        with T.parallel(0, count) as row:
            exponentials(lambda j: x[row, j], y, [row], width, lanes)
            total = T.bind(_sum(y, row, width, lanes))
            scale = T.bind(tirx.const(1.0, "float32") / total)
            store = lambda at, n: each(n, lambda j: T.buffer_store(y, y[row, at + j] * scale, [row, at + j]))  # noqa: E731
            vectors(width, lanes, store)
    return builder.get()


def exponentials(x: Any, y: Any, row: list[Any], width: Any, lanes: int) -> None:
    """``y[row, j] = e^(x(j) - max)``. Where all are -inf, zeros. A NaN stays one."""
    top = largest(x, width, lanes)
    store = lambda at, n: each(n, lambda j: T.buffer_store(y, exp(x(at + j) - top), [*row, at + j]))  # noqa: E731
    vectors(width, lanes, store)


def largest(x: Any, width: Any, lanes: int) -> Any:
    """The largest ``x(j)``, or 0 where all are -inf: -inf less -inf would be no number."""
    top = Lanes(lanes, float("-inf"), tirx.max)
    vectors(width, lanes, lambda at, n: top.add(lambda j: x(at + j), n))
    value = top.result()
    return T.bind(tirx.Select(value == tirx.const(float("-inf"), "float32"), tirx.const(0.0, "float32"), value))


def _sum(y: Any, row: Any, width: Any, lanes: int) -> Any:
    total = Lanes(lanes, 0.0, add)
    vectors(width, lanes, lambda at, n: total.add(lambda j: y[row, at + j], n))
    return total.result()
