"""Rows sorted by expert and back, as operators of their own: for blocks whose activation is the program's own code."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from moeify.backends.tvm.cuda.building import DTYPES, argument, each, function, size
from moeify.backends.tvm.cuda.dispatch import dispatch
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.types import tensor_type

_ROWS = 64  # of a tile; the tiles of this dispatch are not read


def permute(emitter: Emitter, x: Any, experts: Any, num_experts: int) -> Any:
    """``(rows [R, D], counts [E] int64, order [R] int64)``; see ``moe.permute``."""
    (tokens, width), k, dtype = shape_of(x), shape_of(experts)[1], dtype_of(x)
    if dtype not in DTYPES:
        return None
    order, _, counts = dispatch(emitter, experts, num_experts, _ROWS)
    name = f"moe_permute_k{k}_{width}_{dtype}"
    kernel = emitter.kernel(name, lambda: make_permute(k, width, dtype))
    out = [tensor_type((tokens * k, width), dtype), tensor_type((tokens * k,), "int64")]
    both = emitter.call(kernel, [x, experts, order], out)
    rows, wide = (emitter.emit(both[i]) for i in range(2))
    return emitter.emit(relax.Tuple([rows, emitter.emit(relax.op.astype(counts, "int64")), wide]))


def unpermute(emitter: Emitter, rows: Any, order: Any, weights: Any) -> Any:
    """``y[t] = sum over k of weights[t, k] * rows[row of slot t * K + k]``."""
    (tokens, k), (total, width), dtype = shape_of(weights), shape_of(rows), dtype_of(rows)
    if dtype not in DTYPES or dtype_of(weights) != dtype:
        return None
    kernel = emitter.kernel(f"moe_unpermute_k{k}_{width}_{dtype}", lambda: make_unpermute(k, width, dtype))
    out = [tensor_type((total,), "int64"), tensor_type((tokens, width), dtype)]
    both = emitter.call(kernel, [rows, order, weights], out)
    return emitter.emit(both[1])


def make_permute(k: int, width: int, dtype: str) -> tirx.PrimFunc:
    """``(x [T, D], experts [T, K], order [T * K] int32, rows [T * K, D], order [T * K] int64)``."""
    with function() as builder:
        tokens = size(None, "tokens")
        x = argument("x", (tokens, width), dtype)
        argument("experts", (tokens, k), "int64")  # of the call, for whoever watches it
        order = argument("order", (tokens * k,), "int32")
        rows = argument("rows", (tokens * k, width), dtype)
        wide = argument("wide", (tokens * k,), "int64")
        with each(tokens * k * width) as i:
            row, column = i // width, i % width
            B.buffer_store(rows, x[tirx.Cast("int64", order[row]) // k, column], [row, column])
        with each(tokens * k) as row:
            B.buffer_store(wide, tirx.Cast("int64", order[row]), [row])
    return builder.get()


def make_unpermute(k: int, width: int, dtype: str) -> tirx.PrimFunc:
    """``(rows [T * K, D], order [T * K], weights [T, K], rank [T * K], y [T, D])``; sums in float32."""
    with function() as builder:
        tokens = size(None, "tokens")
        rows = argument("rows", (tokens * k, width), dtype)
        order = argument("order", (tokens * k,), "int64")
        weights = argument("weights", (tokens, k), dtype)
        rank = argument("rank", (tokens * k,), "int64")
        y = argument("y", (tokens, width), dtype)
        with each(tokens * k) as row:
            B.buffer_store(rank, row, [order[row]])
        with each(tokens * width) as i:
            t, column = i // width, i % width
            value = None
            for j in range(k):
                weight = T.Cast("float32", weights[t, j])
                term = weight * T.Cast("float32", rows[rank[t * k + j], column])
                value = term if value is None else value + term
            B.buffer_store(y, T.Cast(dtype, value), [t, column])
    return builder.get()
