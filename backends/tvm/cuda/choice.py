"""The choice of experts: the k largest of each token's scores, one thread for each score.

A score's place is the number of scores that go before it, which needs no sorting and no waiting. The order is that of
``torch.sort(stable=True, descending=True)``: NaN first, the largest next, of equal ones the first.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from moeify.backends.tvm.cuda.building import DTYPES, argument, each, function, scratch, size
from moeify.backends.tvm.cuda.dense import softmax
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.types import tensor_type

_MOST = 1024  # scores of a token: each is compared with all


def topk(emitter: Emitter, scores: Any, k: int) -> Any:
    """``(values [T, k], indices [T, k] int64)``. None for more than 1024 scores, or other types than ours."""
    (tokens, experts), dtype = shape_of(scores), dtype_of(scores)
    if dtype not in DTYPES or not isinstance(experts, int) or experts > _MOST:
        return None
    kernel = emitter.kernel(f"moe_topk_e{experts}_k{k}_{dtype}", lambda: make_topk(experts, k, dtype))
    return emitter.call(kernel, [scores], [tensor_type((tokens, k), dtype), tensor_type((tokens, k), "int64")])


def route(emitter: Emitter, logits: Any, k: int) -> Any:
    """``(probabilities [T, k], indices [T, k] int64)``: of the probabilities, so that ties are the program's."""
    experts = shape_of(logits)[1]
    if dtype_of(logits) not in DTYPES or not isinstance(experts, int) or experts > _MOST:
        return None
    return topk(emitter, softmax(emitter, logits), k)


def make_topk(experts: int, k: int, dtype: str) -> tirx.PrimFunc:
    """``(scores [T, E], values [T, k], indices [T, k])``."""
    with function() as builder:
        tokens = size(None, "tokens")
        scores = argument("scores", (tokens, experts), dtype)
        values = argument("values", (tokens, k), dtype)
        indices = argument("indices", (tokens, k), "int64")
        with each(tokens * experts) as i:
            t, e, place = i // experts, i % experts, scratch(1, "int32")
            mine = _key(scores[t, e])
            B.buffer_store(place, T.int32(0), [0])
            with B.serial(tirx.const(experts, "int64")) as other:
                theirs = _key(scores[t, other])
                first = tirx.any(theirs > mine, tirx.all(theirs == mine, other < e))
                B.buffer_store(place, place[0] + tirx.Cast("int32", first), [0])
            with B.If(place[0] < k), B.Then():
                B.buffer_store(values, scores[t, e], [t, place[0]])
                B.buffer_store(indices, e, [t, place[0]])
    return builder.get()


def _key(score: Any) -> Any:
    """An integer of the same order, in which NaN is the largest and both zeros are one number.

    Compilers may assume that a comparison of floats has no NaN; with integers there is nothing to assume.
    """
    bits = tirx.reinterpret("int32", T.Cast("float32", score))
    size = tirx.bitwise_and(bits, T.int32(0x7FFFFFFF))
    ordered = tirx.Select(bits < 0, -size, size)
    return tirx.Select(size > T.int32(0x7F800000), T.int32(0x7FFFFFFF), ordered)
