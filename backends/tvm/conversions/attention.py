"""Scaled dot product attention: the target's own kernel, or its formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax, te, tirx

from moeify.backends.tvm.conversions.matrices import product
from moeify.backends.tvm.conversions.movement import permuted
from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.emitter import dtype_of, shape_of

_aten = torch.ops.aten
_op = relax.op


def _attention(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """Of any rank from 2 on: leading axes but the last of them are one batch."""
    value = node.meta["val"]
    q, k, v = (t.tensor(args[name]) for name in ("query", "key", "value"))
    mask = None if args["attn_mask"] is None else t.tensor(args["attn_mask"])
    if value.dim() > 4:
        return NotImplemented
    q, k, v = (_four(t, x) for x in (q, k, v))
    if mask is not None:
        mask = _four(t, mask)
    if not args["enable_gqa"]:
        k, v = (_heads(t, x, q) for x in (k, v))
    scale = args["scale"]
    scale = 1 / math.sqrt(int(shape_of(q)[-1])) if scale is None else float(scale)
    causal = bool(args["is_causal"])
    result = t.families("attention", t.emitter, q, k, v, mask, causal, scale)
    if result is None:
        result = _formula(t, q, k, v, mask, causal, scale)
    return t.reshape(result, t.shape(node))


def _four(t: Translation, x: Any) -> Any:
    shape = shape_of(x)
    return t.reshape(x, [1] * (4 - len(shape)) + shape)


def _heads(t: Translation, x: Any, q: Any) -> Any:
    """Without grouped heads, batch and heads broadcast to those of the queries."""
    shape = shape_of(x)
    return t.broadcast(x, [*shape_of(q)[:2], *shape[2:]])


def _formula(t: Translation, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float) -> Any:
    """softmax(q k^T scale + mask) v; a row whose keys are all masked gives zeros, as torch does."""
    dtype = dtype_of(q)
    heads, groups = shape_of(q)[1], shape_of(k)[1]
    if not t.symbols.equal(heads, groups):
        times = heads // groups
        k, v = (t.emit(_op.repeat(x, times, 1)) for x in (k, v))
    scores = product(t, t.emit(_op.multiply(q, t.tensor(scale, dtype))), permuted(t, k, [0, 1, 3, 2]))
    low = t.tensor(-math.inf, dtype)
    if causal:
        scores = t.emitter.builder.emit_te(_below, scores)
    if mask is not None and dtype_of(mask) == "bool":
        scores = t.emit(_op.where(t.aligned(mask, shape_of(scores)), scores, low))
    elif mask is not None:
        scores = t.emit(_op.add(scores, t.cast(t.aligned(mask, shape_of(scores)), dtype)))
    top = t.emit(_op.max(scores, 3, keepdims=True))
    top = t.emit(_op.where(t.emit(_op.equal(top, low)), t.tensor(0.0, dtype), top))
    grown = t.emit(_op.exp(t.emit(_op.subtract(scores, top))))
    total = t.emit(_op.sum(grown, 3, keepdims=True))
    total = t.emit(_op.where(t.emit(_op.equal(total, t.tensor(0.0, dtype))), t.tensor(1.0, dtype), total))
    return product(t, t.emit(_op.divide(grown, total)), v)


def _below(scores: te.Tensor) -> te.Tensor:
    """torch's causal mask: position i sees keys 0 to i, however many keys there are."""

    def element(b: Any, h: Any, i: Any, j: Any) -> Any:
        return tirx.if_then_else(j <= i, scores(b, h, i, j), tirx.const(-math.inf, scores.dtype))

    return te.compute(scores.shape, element, name="causal")


TABLE: dict[Any, Convert] = {_aten.scaled_dot_product_attention.default: _attention}
