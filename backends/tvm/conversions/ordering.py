"""Places in sorted data, and writing to places that a tensor says: loops of a CPU, by kernels of our own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.script import tirx as T

from moeify.backends.tvm.conversions.translation import Convert, Translation, rank_of
from moeify.backends.tvm.types import dtype_name, tensor_type

_aten = torch.ops.aten


def _search_sorted(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """Where each value would stand in the sorted rows [A, N], or in one sorted row [N]."""
    if t.emitter.machine.kind == "cuda" or args.get("sorter") is not None:
        return NotImplemented
    data = args["sorted_sequence"].meta["val"]
    number = not isinstance(args["self"], fx.Node)
    sizes = [] if number else t.sizes(list(args["self"].meta["val"].shape))
    shape = t.sizes(list(data.shape))
    leading = shape[:-1]
    count, of = (t.symbols.simplify(math.prod(part)) for part in (leading, sizes[len(leading) :]))
    sequence = t.reshape(t.tensor(args["sorted_sequence"]), [count, shape[-1]])
    values = t.reshape(t.tensor(args["self"], data.dtype), [count, of])
    right = bool(args["right"]) or args.get("side") == "right"
    dtype, result = dtype_name(data.dtype), dtype_name(node.meta["val"].dtype)
    name = f"searchsorted_{'right' if right else 'left'}_{dtype}_{result}"
    kernel = t.emitter.kernel(name, lambda: _search(dtype, result, right))
    found = t.emitter.call(kernel, [sequence, values], tensor_type((count, of), result))
    return t.reshape(found, t.shape(node))


def _search(dtype: str, result: str, right: bool) -> tirx.PrimFunc:
    """By bisection, as torch has it: what cannot be compared is taken to be less, so a NaN that is looked for comes
    last. (TVM makes ``<`` of a negated ``>=``, which is not the same.)
    """

    @T.prim_func(s_tir=True)
    def search(sequence: T.handle, values: T.handle, places: T.handle):
        T.func_attr({"tirx.noalias": True})
        A = T.int64()
        N = T.int64()
        M = T.int64()
        X = T.match_buffer(sequence, (A, N), dtype)
        V = T.match_buffer(values, (A, M), dtype)
        P = T.match_buffer(places, (A, M), result)
        for i in T.parallel(A * M):
            ends = T.alloc_buffer((2,), "int64", scope="local")
            ends[0] = T.int64(0)
            ends[1] = N
            while ends[0] < ends[1]:
                middle: T.int64 = T.floordiv(ends[0] + ends[1], T.int64(2))
                value = V[i // M, i % M]
                here = X[i // M, middle]
                less = here <= value if right else here < value
                if T.Or(less, T.Or(tirx.isnan(here), tirx.isnan(value))):
                    ends[0] = middle + T.int64(1)
                else:
                    ends[1] = middle
            P[i // M, i % M] = T.Cast(result, ends[0])

    return search


def _scatter(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """A copy with ``src`` (or one value) at the places ``index`` along one axis.

    torch leaves open which of two values at one place stays: here it is the last.
    """
    data, index = args["self"].meta["val"], args["index"].meta["val"]
    if t.emitter.machine.kind == "cuda" or not data.dim():
        return NotImplemented
    dim = args["dim"] % rank_of(args)
    shape, places = (t.sizes(list(one.shape)) for one in (data, index))
    same = all(t.symbols.equal(a, b) for axis, (a, b) in enumerate(zip(shape, places)) if axis != dim)
    if not same:
        return NotImplemented  # part of the other axes is left as it was
    src = args.get("src")
    if src is None:
        src = t.broadcast(t.tensor(args["value"], data.dtype), places)
    else:
        given = t.sizes(list(src.meta["val"].shape))
        if not all(t.symbols.equal(a, b) for a, b in zip(given, places)):
            return NotImplemented  # of a larger source a part is read
        src = t.tensor(src)
    before, after = (t.symbols.simplify(math.prod(part)) for part in (shape[:dim], shape[dim + 1 :]))
    dtype = dtype_name(data.dtype)
    kernel = t.emitter.kernel(f"scatter_{dtype}", lambda: _put(dtype))
    operands = [
        t.reshape(t.tensor(args["self"]), [before, shape[dim], after]),
        t.reshape(t.tensor(args["index"], torch.int64), [before, places[dim], after]),
        t.reshape(src, [before, places[dim], after]),
    ]
    return t.reshape(t.emitter.call(kernel, operands, tensor_type((before, shape[dim], after), dtype)), shape)


def _put(dtype: str) -> tirx.PrimFunc:
    """Along the middle axis; the outer one in parallel. An index outside writes nothing: no kernel may write there."""

    @T.prim_func(s_tir=True)
    def put(source: T.handle, index: T.handle, values: T.handle, result: T.handle):
        T.func_attr({"tirx.noalias": True})
        A = T.int64()
        N = T.int64()
        B = T.int64()
        M = T.int64()
        X = T.match_buffer(source, (A, N, B), dtype)
        I = T.match_buffer(index, (A, M, B), "int64")  # noqa: E741
        V = T.match_buffer(values, (A, M, B), dtype)
        Y = T.match_buffer(result, (A, N, B), dtype)
        for a in T.parallel(A):
            for n, b in T.grid(N, B):
                Y[a, n, b] = X[a, n, b]
            for m, b in T.grid(M, B):
                if T.And(I[a, m, b] >= T.int64(0), I[a, m, b] < N):
                    Y[a, I[a, m, b], b] = V[a, m, b]

    return put


TABLE: dict[Any, Convert] = {
    _aten.searchsorted.Tensor: _search_sorted,
    _aten.searchsorted.Scalar: _search_sorted,
    _aten.scatter.src: _scatter,
    _aten.scatter.value: _scatter,
}
