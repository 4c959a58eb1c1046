"""Operators that move elements and compute none: views, slices, concatenation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tvm import relax

from moeify.backends.tvm.conversions.translation import Convert, Translation, rank_of
from moeify.backends.tvm.emitter import shape_of

_aten = torch.ops.aten
_op = relax.op


def _same(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    return t.tensor(next(iter(args.values())))


def _reshape(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """To the shape that torch computed: the arguments may hold -1, and a 0 means something else to TVM."""
    return t.reshape(t.tensor(next(iter(args.values()))), t.shape(node))


def _expand(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    shape = t.shape(node)
    return t.broadcast(t.aligned(t.tensor(args["self"]), shape), shape)


def _permute(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    rank = rank_of(args)
    order = [dim % rank for dim in args["dims"]]
    return permuted(t, t.tensor(args["self"]), order)


def _transpose(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    rank = rank_of(args)
    if rank < 2:
        return t.tensor(args["self"])
    order = list(range(rank))
    a, b = (args.get("dim0", 0) % rank, args.get("dim1", 1) % rank)
    order[a], order[b] = order[b], order[a]
    return permuted(t, t.tensor(args["self"]), order)


def permuted(t: Translation, x: Any, order: Sequence[int]) -> Any:
    """The axes in another order; a reshape where only axes of size 1 move."""
    shape = shape_of(x)
    kept = [axis for axis in order if shape[axis] != 1]
    if kept == sorted(kept):
        return t.reshape(x, [shape[axis] for axis in order])
    return t.emit(_op.permute_dims(x, list(order)))


def _repeat(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """[a, b] repeated is a view [1, a, 1, b] expanded to [n, a, m, b]."""
    times = t.sizes(args["repeats"])
    x = t.tensor(args["self"])
    shape = [1] * (len(times) - len(shape_of(x))) + shape_of(x)
    apart = [size for one in shape for size in (1, one)]
    wide = [size for pair in zip(times, shape) for size in pair]
    return t.reshape(t.broadcast(t.reshape(x, apart), wide), t.shape(node))


def _repeat_each(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """repeat_interleave by one number."""
    if args.get("dim") is None or (
        isinstance(args["repeats"], fx.Node) and isinstance(args["repeats"].meta["val"], torch.Tensor)
    ):
        return NotImplemented
    dim = args["dim"] % rank_of(args)
    x, times = t.tensor(args["self"]), t.size(args["repeats"])
    shape = shape_of(x)
    wide = [*shape[: dim + 1], times, *shape[dim + 1 :]]
    apart = [*shape[: dim + 1], 1, *shape[dim + 1 :]]
    return t.reshape(t.broadcast(t.reshape(x, apart), wide), t.shape(node))


def _flip(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x = t.tensor(args["self"])
    for dim in args["dims"]:
        x = t.emit(_op.flip(x, dim % rank_of(args)))
    return x


TABLE: dict[Any, Convert] = {
    **dict.fromkeys(
        (
            _aten.alias.default,
            _aten.clone.default,
            _aten.contiguous.default,
            _aten.detach.default,
            _aten.detach_.default,
            _aten.lift_fresh_copy.default,
            _aten._to_copy.default,
            _aten.to.dtype,
            _aten.to.dtype_layout,
            _aten.to.device,
            _aten.to.other,
            _aten.type_as.default,
            _aten.dropout.default,  # in evaluation
            _aten.feature_dropout.default,
            _aten.resolve_conj.default,
            _aten.resolve_neg.default,
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            _aten.view.default,
            _aten.reshape.default,
            _aten._unsafe_view.default,
            _aten.flatten.using_ints,
            _aten.unflatten.int,
            _aten.squeeze.default,
            _aten.squeeze.dim,
            _aten.squeeze.dims,
            _aten.unsqueeze.default,
            _aten.view_as.default,
            _aten.reshape_as.default,
        ),
        _reshape,
    ),
    _aten.expand.default: _expand,
    _aten.expand_as.default: _expand,
    _aten.broadcast_to.default: _expand,
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.t.default: _transpose,
    _aten.repeat.default: _repeat,
    _aten.tile.default: _repeat,
    _aten.repeat_interleave.self_int: _repeat_each,
    _aten.flip.default: _flip,
}
