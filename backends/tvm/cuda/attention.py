"""The scores of attention: a product whose sums are scaled and masked before they are stored."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from moeify.backends.tvm.cuda.building import argument, size
from moeify.backends.tvm.cuda.matmul import Dense, make_dense

Mask = tuple[str, tuple[bool, ...]]  # its type, and which of its four axes have one entry for all


def make_scores(spec: Dense, heads: int, causal: bool, scale: float, mask: Mask | None) -> Any:
    """``(q [B H, S, D], k [B G, L, D], mask [B or 1, H or 1, S or 1, L or 1] where there is one, scores [B H, S, L])``.

    A mask of bool says what is seen; another is added. ``causal``: row i sees the first i + 1 columns.
    """

    def extra(batch: Any, m: Any, n: Any) -> Any:
        given, dtype = None, ""
        ones: tuple[bool, ...] = (False,) * 4
        if mask is not None:
            dtype, ones = mask
            full = (size(None, "examples"), tirx.const(heads, "int64"), m, n)
            shape = [tirx.const(1, "int64") if one else whole for one, whole in zip(ones, full)]
            given = argument("mask", shape, dtype)

        def change(s: Any, i: Any, c: Any, value: Any) -> Any:
            value = value * T.float32(scale)
            hidden = T.float32(float("-inf"))
            if given is not None:
                place = (s // heads, s % heads, i, c)
                seen = given[tuple(T.int64(0) if one else p for one, p in zip(ones, place))]
                if dtype == "bool":
                    value = tirx.if_then_else(seen, value, hidden)
                else:
                    value = value + T.Cast("float32", seen)
            return tirx.if_then_else(c <= i, value, hidden) if causal else value

        return change

    return make_dense(spec, extra)
