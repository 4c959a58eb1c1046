"""Rows sorted by expert and back, as operators of their own: for blocks whose activation is the program's own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.dispatch import histogram, wide
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.types import tensor_type

_LANES = 16
_OWN = ("float32", "float64")  # other floats go through float32


def permute(emitter: Emitter, x: Any, experts: Any, num_experts: int) -> Any:
    """``(rows [R, D], counts [E] int64, order [R] int64)``; see ``moe.permute``."""
    (tokens, width), K = shape_of(x), shape_of(experts)[1]
    given = dtype_of(x)
    dtype = given if given in _OWN else "float32"
    name = f"moe_permute_e{num_experts}_k{K}_{width}_{dtype}"
    kernel = emitter.kernel(name, lambda: make_permute(num_experts, K, width, dtype))
    out = [
        tensor_type((tokens * K, width), dtype),
        tensor_type((num_experts,), "int64"),
        tensor_type((tokens * K,), "int64"),
    ]
    if dtype == given:
        return emitter.call(kernel, [x, experts], out)
    result = emitter.call(kernel, [emitter.emit(relax.op.astype(x, dtype)), experts], out)
    rows, counts, order = (emitter.emit(result[i]) for i in range(3))
    return emitter.emit(relax.Tuple([emitter.emit(relax.op.astype(rows, given)), counts, order]))


def unpermute(emitter: Emitter, rows: Any, order: Any, weights: Any) -> Any:
    """``y[t] = sum over k of weights[t, k] * rows[row of slot t * K + k]``."""
    (tokens, K), width, given = shape_of(weights), shape_of(rows)[1], dtype_of(rows)
    dtype = given if given in _OWN else "float32"
    if dtype != given:
        rows, weights = (emitter.emit(relax.op.astype(value, dtype)) for value in (rows, weights))
    kernel = emitter.kernel(f"moe_unpermute_k{K}_{width}_{dtype}", lambda: make_unpermute(K, width, dtype))
    ranks = emitter.kernel("moe_ranks", make_ranks)
    rank = emitter.call(ranks, [order], tensor_type(shape_of(order), "int64"))
    y = emitter.call(kernel, [rows, rank, weights], tensor_type((tokens, width), dtype))
    return y if dtype == given else emitter.emit(relax.op.astype(y, given))


def make_permute(num_experts: int, k: int, width: int, dtype: str) -> tirx.PrimFunc:
    """``(x [T, D], experts [T, K], rows [T * K, D], counts [E], order [T * K])``."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("x", "experts", "rows", "counts", "order")]
        tokens = T.int64()
        x = T.match_buffer(handles[0], (tokens, width), dtype)
        experts = T.match_buffer(handles[1], (tokens, k), "int64")
        rows = T.match_buffer(handles[2], (tokens * k, width), dtype)
        counts = T.match_buffer(handles[3], (num_experts,), "int64")
        order = T.match_buffer(handles[4], (tokens * k,), "int64")
        place = T.alloc_buffer((num_experts,), "int32")
        histogram(experts, place, num_experts)
        run = T.alloc_buffer((1,), "int32")
        T.buffer_store(run, tirx.const(0, "int32"), [0])
        with T.serial(0, num_experts) as e:
            n = T.bind(place[e])
            T.buffer_store(counts, wide(n), [e])
            T.buffer_store(place, run[0], [e])
            T.buffer_store(run, run[0] + n, [0])
        with T.serial(0, tokens) as t, T.serial(0, tirx.const(k, "int64")) as j:
            e = T.bind(experts[t, j])
            T.buffer_store(order, t * k + j, [wide(place[e])])
            T.buffer_store(place, place[e] + 1, [e])
        with T.parallel(0, tokens * k) as r:
            token = T.bind(tirx.floordiv(order[r], k))
            _columns(width, lambda d: T.buffer_store(rows, x[token, d], [r, d]))
    return builder.get()


def make_ranks() -> tirx.PrimFunc:
    """``(order [R], rank [R])``: the sorted row of each slot."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("order", "rank")]
        size = T.int64()
        order, rank = (T.match_buffer(handle, (size,), "int64") for handle in handles)
        with T.serial(0, size) as r:
            T.buffer_store(rank, r, [order[r]])
    return builder.get()


def make_unpermute(k: int, width: int, dtype: str) -> tirx.PrimFunc:
    """``(rows [T * K, D], rank [T * K], weights [T, K], y [T, D])``."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("rows", "rank", "weights", "y")]
        tokens = T.int64()
        rows = T.match_buffer(handles[0], (tokens * k, width), dtype)
        rank = T.match_buffer(handles[1], (tokens * k,), "int64")
        weights = T.match_buffer(handles[2], (tokens, k), dtype)
        y = T.match_buffer(handles[3], (tokens, width), dtype)
        with T.parallel(0, tokens) as t:
            at = [T.bind(rank[t * k + j]) for j in range(k)]
            scale = [T.bind(weights[t, j]) for j in range(k)]

            def combine(d: Any) -> None:
                value = scale[0] * rows[at[0], d]
                for j in range(1, k):
                    value = value + scale[j] * rows[at[j], d]
                T.buffer_store(y, value, [t, d])

            _columns(width, combine)
    return builder.get()


def _columns(width: int, emit: Callable[[Any], None]) -> None:
    """``emit`` for every column, in vectors and then the rest."""
    whole = width - width % _LANES
    with T.serial(0, whole // _LANES) as chunk, T.vectorized(0, _LANES) as j:
        emit(chunk * _LANES + j)
    with T.serial(whole, width) as d:
        emit(d)
