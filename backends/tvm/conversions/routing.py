"""The choice of experts: a stable sort of which only the first k are read is a top-k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax

from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.emitter import rows, shape_of
from moeify.ir.emit import arguments

_aten = torch.ops.aten
_op = relax.op


def _sort(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value = node.meta["val"][0]
    if args["dim"] % max(value.dim(), 1) == value.dim() - 1 and args["descending"] and value.dtype == torch.float32:
        k = _kept(node)
        if k is not None:
            best = _best(t, args["self"], k)
            if best is not None:
                # The slices have their results now, and nothing reads the sort itself.
                for got in node.users:
                    for user in got.users:
                        t.env[user] = t.conform(best[int(str(got.args[1]))], user.meta["val"])
                return [t.unknown(one) for one in node.meta["val"]]
    x, axis = t.tensor(args["self"]), args["dim"] % value.dim()
    # TVM's argsort is a stable one; its sort of values is not.
    order = t.emit(_op.argsort(x, axis, bool(args["descending"]), "int64"))
    return [t.emit(_op.gather_elements(x, order, axis)), order]


def _kept(node: fx.Node) -> int | None:
    """k where all that reads a sort along the last axis is a slice of the first k."""
    lengths = set()
    for got in node.users:
        for user in got.users:
            if user.target != _aten.slice.Tensor or user.args[0] is not got:
                return None
            args = arguments(user)
            fits = args["dim"] in (-1, got.meta["val"].dim() - 1) and args["start"] in (None, 0) and args["step"] == 1
            length = user.meta["val"].shape[-1]
            if not fits or not isinstance(length, int):
                return None
            lengths.add(length)
    return lengths.pop() if len(lengths) == 1 else None


def _best(t: Translation, scores: fx.Node, k: int) -> list[Any] | None:
    """The k largest along the last axis and their places, by the target's kernel."""
    probabilities = _logits(t, scores)
    if probabilities is not None:
        flat, leading = rows(t.emitter, t.tensor(probabilities))
        found = t.families("route", t.emitter, flat, k)
        if found is not None:
            return [t.reshape(one, [*leading, k]) for one in found]
    flat, leading = rows(t.emitter, t.tensor(scores))
    found = t.families("topk", t.emitter, flat, k)
    return None if found is None else [t.reshape(one, [*leading, k]) for one in found]


def _logits(t: Translation, scores: fx.Node) -> fx.Node | None:
    """What the scores are the softmax of, where nothing else reads them."""
    if scores.target != _aten.softmax.int or len(scores.users) != 1:
        return None
    args = arguments(scores)
    source = args["self"]
    same = source.meta["val"].dtype == scores.meta["val"].dtype
    return source if same and args["dim"] in (-1, scores.meta["val"].dim() - 1) else None


def _topk(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """torch promises no order of equal values: the stable one is one of those that it may give."""
    value = node.meta["val"][0]
    axis, k = args["dim"] % value.dim(), t.size(args["k"])
    if axis != value.dim() - 1 or not isinstance(k, int):
        return NotImplemented
    if args["largest"] and value.dtype == torch.float32:
        best = _best(t, args["self"], k)
        if best is not None:
            return best
    x = t.tensor(args["self"])
    order = t.emit(_op.argsort(x, axis, bool(args["largest"]), "int64"))
    order = t.emit(_op.strided_slice(order, axes=[axis], begin=[0], end=[k]))
    return [t.emit(_op.gather_elements(x, order, axis)), order]


def _argsort(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x = t.tensor(args["self"])
    return t.emit(_op.argsort(x, args["dim"] % len(shape_of(x)), bool(args["descending"]), "int64"))


TABLE: dict[Any, Convert] = {
    _aten.sort.stable: _sort,
    _aten.sort.default: _sort,
    _aten.topk.default: _topk,
    _aten.argsort.default: _argsort,
    _aten.argsort.stable: _argsort,
}
