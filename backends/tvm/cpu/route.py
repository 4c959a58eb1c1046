"""The choice of experts: the k largest of each token's scores, of a softmax over them where there is one.

The order is that of ``torch.sort(stable=True, descending=True)``: NaN first, the largest next, of equal ones the first.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.mathematics import exp
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.types import tensor_type

_TYPES = ("float32", "float64", "float16")
_LANES = 8


def topk(emitter: Emitter, scores: Any, k: int) -> Any:
    """``(values [T, k], indices [T, k] int64)`` of scores [T, E]. None for types other than floats."""
    (tokens, experts), dtype = shape_of(scores), dtype_of(scores)
    if dtype not in _TYPES or not isinstance(experts, int):
        return None
    kernel = emitter.kernel(f"topk_e{experts}_k{k}_{dtype}", lambda: make_topk(experts, k, dtype))
    return emitter.call(kernel, [scores], [tensor_type((tokens, k), dtype), tensor_type((tokens, k), "int64")])


def route(emitter: Emitter, logits: Any, k: int) -> Any:
    """``(probabilities [T, k], indices [T, k] int64)`` of float32 logits [T, E]; None for other types."""
    tokens, experts = shape_of(logits)
    if dtype_of(logits) != "float32" or not isinstance(experts, int):
        return None
    kernel = emitter.kernel(f"moe_route_e{experts}_k{k}", lambda: make_route(experts, k))
    return emitter.call(kernel, [logits], [tensor_type((tokens, k), "float32"), tensor_type((tokens, k), "int64")])


def make_topk(experts: int, k: int, dtype: str) -> tirx.PrimFunc:
    """``(scores [T, E], values [T, k], indices [T, k])``."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("scores", "values", "indices")]
        tokens = T.int64()
        scores = T.match_buffer(handles[0], (tokens, experts), dtype)
        values = T.match_buffer(handles[1], (tokens, k), dtype)
        indices = T.match_buffer(handles[2], (tokens, k), "int64")
        with T.parallel(0, tokens) as t:
            _select(scores, t, values, indices, t, k)
    return builder.get()


def make_route(experts: int, k: int) -> tirx.PrimFunc:
    """``(logits [T, E], probabilities [T, k], indices [T, k])``.

    The choice is made among the logits' probabilities and not among the logits: where two of those round to one
    number, the first is chosen, as the program does.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("logits", "values", "indices")]
        tokens = T.int64()
        logits = T.match_buffer(handles[0], (tokens, experts), "float32")
        values = T.match_buffer(handles[1], (tokens, k), "float32")
        indices = T.match_buffer(handles[2], (tokens, k), "int64")
        with T.parallel(0, tokens) as t:
            probabilities = T.alloc_buffer((1, experts), "float32")
            _softmax(logits, probabilities, t)
            _select(probabilities, 0, values, indices, t, k)
    return builder.get()


def _softmax(logits: Any, out: Any, t: Any) -> None:
    """Emit row ``t`` of the softmax into the single row of ``out``."""
    experts = int(logits.shape[1])
    run = T.alloc_buffer((2,), "float32", scope="local")  # the largest, the sum
    T.buffer_store(run, logits[t, 0], [0])
    with T.serial(1, experts) as e:
        largest, here = run[0], logits[t, e]
        # NaN is no smaller than anything: once met, it stays, and every probability becomes NaN.
        T.buffer_store(run, tirx.Select(tirx.any(largest >= here, tirx.isnan(largest)), largest, here), [0])
    T.buffer_store(run, tirx.const(0, "float32"), [1])
    whole = experts - experts % _LANES
    if whole:
        with T.serial(0, whole // _LANES) as chunk, T.vectorized(0, _LANES) as j:
            e = chunk * _LANES + j
            T.buffer_store(out, exp(logits[t, e] - run[0]), [0, e])
    with T.serial(whole, experts) as e:
        T.buffer_store(out, exp(logits[t, e] - run[0]), [0, e])
    with T.serial(0, experts) as e:
        T.buffer_store(run, run[1] + out[0, e], [1])
    with T.serial(0, experts) as e:
        T.buffer_store(out, out[0, e] / run[1], [0, e])


def _select(scores: Any, row: Any, values: Any, indices: Any, t: Any, k: int) -> None:
    """Emit the choice of token ``t``, whose scores are this row.

    The best so far are a sorted list, into which each score is inserted.
    """
    experts = tirx.const(int(scores.shape[1]), "int64")
    place = T.alloc_buffer((1,), "int64", scope="local")
    one = tirx.const(1, "int64")
    with T.serial(tirx.const(0, "int64"), experts) as e:
        score = T.bind(scores[row, e])
        T.buffer_store(place, tirx.min(e, tirx.const(k, "int64")), [0])
        # The value before the place is smaller: it moves down (out of the list at its end).
        with T.While(tirx.if_then_else(place[0] > 0, _before(score, values[t, place[0] - one]), False)):
            with T.If(place[0] < k), T.Then():
                T.buffer_store(values, values[t, place[0] - one], [t, place[0]])
                T.buffer_store(indices, indices[t, place[0] - one], [t, place[0]])
            T.buffer_store(place, place[0] - one, [0])
        with T.If(place[0] < k), T.Then():
            T.buffer_store(values, score, [t, place[0]])
            T.buffer_store(indices, e, [t, place[0]])


def _before(a: Any, b: Any) -> Any:
    """Whether ``a``, met later, goes before ``b``."""
    return tirx.any(a > b, tirx.all(tirx.isnan(a), tirx.Not(tirx.isnan(b))))
