"""Sums, means, extremes and what is made of them; softmax; running sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax, tirx
from tvm.script import tirx as T

from moeify.backends.tvm.conversions.movement import permuted
from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.emitter import shape_of
from moeify.backends.tvm.types import dtype_name

_aten = torch.ops.aten
_op = relax.op


def _axes(args: Mapping[str, Any], name: str = "dim") -> list[int]:
    """Of the reduction; all of them where none are given."""
    rank = args["self"].meta["val"].dim()
    dims = args.get(name)
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)] if rank else []


def _reduce(op: Callable[..., Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        x = t.tensor(args["self"], node.meta["val"].dtype)
        return t.emit(op(x, _axes(args), keepdims=bool(args.get("keepdim", False))))

    return convert


def _any(reduce: Callable[..., Any]) -> Convert:
    """By sums of zeros and ones: Relax has no reduction of booleans."""

    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        x = t.cast(t.tensor(args["self"], torch.bool), torch.int32)
        return t.cast(t.emit(reduce(x, _axes(args), keepdims=bool(args.get("keepdim", False)))), torch.bool)

    return convert


def _extreme(reduce: Callable[..., Any], place: Callable[..., Any]) -> Convert:
    """max and min along one axis: values and the first of their places."""

    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        x, (axis,), keep = t.tensor(args["self"]), _axes(args), bool(args["keepdim"])
        return [t.emit(reduce(x, axis, keepdims=keep)), t.emit(place(x, axis, keepdims=keep))]

    return convert


def _place(op: Callable[..., Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        x = t.tensor(args["self"])
        if args["dim"] is None:
            return t.reshape(t.emit(op(t.emit(_op.reshape(x, (-1,))), 0, keepdims=False)), t.shape(node))
        return t.emit(op(x, _axes(args)[0], keepdims=bool(args["keepdim"])))

    return convert


def _variance(root: bool) -> Convert:
    """Of two passes, as torch: the mean first, then the squares of what is left."""

    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        dtype = node.meta["val"].dtype
        x, axes, keep = t.tensor(args["self"], dtype), _axes(args), bool(args.get("keepdim", False))
        correction = args.get("correction", int(args.get("unbiased", True)))
        correction = 1 if correction is None else correction
        count: Any = 1
        for axis in axes:
            count = count * shape_of(x)[axis]
        count = t.symbols.simplify(count)
        centre = t.emit(_op.subtract(x, t.emit(_op.mean(x, axes, keepdims=True))))
        total = t.emit(_op.sum(t.emit(_op.multiply(centre, centre)), axes, keepdims=keep))
        if isinstance(count, int):
            divisor = t.tensor(float(count - correction), dtype)
        else:
            number = t.emit(_op.reshape(t.emit(_op.arange(count, count + 1, 1, "int64")), ()))
            divisor = t.emit(_op.subtract(t.cast(number, dtype), t.tensor(float(correction), dtype)))
        result = t.emit(_op.divide(total, divisor))
        return t.emit(_op.sqrt(result)) if root else result

    return convert


def _norm(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dtype, order = node.meta["val"].dtype, args.get("ord", args.get("p"))
    order = 2 if order is None else order
    x, axes, keep = t.tensor(args["self"], dtype), _axes(args), bool(args.get("keepdim", False))
    if order == 2:
        return t.emit(_op.sqrt(t.emit(_op.sum(t.emit(_op.multiply(x, x)), axes, keepdims=keep))))
    size = t.emit(_op.abs(x))
    if order == 1:
        return t.emit(_op.sum(size, axes, keepdims=keep))
    return t.emit(_op.max(size, axes, keepdims=keep)) if order == float("inf") else NotImplemented


def softmax(t: Translation, x: Any, axis: int) -> Any:
    """By the target's own lowering where it has one, over any axis."""
    rank = len(shape_of(x))
    last = [a for a in range(rank) if a != axis] + [axis]
    moved = permuted(t, x, last)
    own = t.families("softmax", t.emitter, moved)
    if own is None:
        return t.emit(_op.nn.softmax(x, axis))
    return permuted(t, own, [last.index(a) for a in range(rank)])


def _softmax(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x = t.tensor(args["self"], node.meta["val"].dtype)
    rank = len(shape_of(x))
    return softmax(t, x, args["dim"] % rank) if rank else t.tensor(1.0, node.meta["val"].dtype)


def _log_softmax(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x = t.tensor(args["self"], node.meta["val"].dtype)
    return t.emit(_op.nn.log_softmax(x, args["dim"] % len(shape_of(x))))


def _log_sum_exp(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x, axes, keep = t.tensor(args["self"]), _axes(args), bool(args["keepdim"])
    top = t.emit(_op.max(x, axes, keepdims=True))
    infinite = t.emit(_op.isinf(top))  # inf less inf would be no number
    top = t.emit(_op.where(infinite, t.tensor(0.0, node.meta["val"].dtype), top))
    total = t.emit(_op.sum(t.emit(_op.exp(t.emit(_op.subtract(x, top)))), axes, keepdims=True))
    result = t.emit(_op.add(t.emit(_op.log(total)), top))
    return result if keep else t.reshape(result, t.shape(node))


def _adaptive_mean(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """Adaptive average pooling down to one element."""
    sizes = args["output_size"]
    if set([sizes] if isinstance(sizes, int) else sizes) != {1}:
        return NotImplemented
    rank = len(sizes)
    x = t.tensor(args["self"])
    axes = list(range(len(shape_of(x)) - rank, len(shape_of(x))))
    return t.emit(_op.mean(x, axes, keepdims=True))


def _running(product: bool) -> Convert:
    """cumsum and cumprod, by a kernel of our own: TVM's is scheduled by nothing."""

    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        if t.emitter.machine.kind == "cuda":
            return NotImplemented  # the kernel is a loop of a CPU
        dtype = node.meta["val"].dtype
        x = t.tensor(args["self"], dtype)
        shape = shape_of(x)
        if not shape:
            return x
        dim = args["dim"] % len(shape)
        before, after = (t.symbols.simplify(math.prod(part)) for part in (shape[:dim], shape[dim + 1 :]))
        flat = t.reshape(x, [before, shape[dim], after])
        name = f"cum{'prod' if product else 'sum'}_{dtype_name(dtype)}"
        kernel = t.emitter.kernel(name, lambda: _run(dtype_name(dtype), product))
        return t.reshape(t.emitter.call(kernel, [flat], flat.ty), shape)

    return convert


def _run(dtype: str, product: bool) -> tirx.PrimFunc:
    """Along the middle axis; the outer one in parallel."""

    @T.prim_func(s_tir=True)
    def run(source: T.handle, result: T.handle):
        T.func_attr({"tirx.noalias": True})
        A = T.int64()
        N = T.int64()
        B = T.int64()
        X = T.match_buffer(source, (A, N, B), dtype)
        Y = T.match_buffer(result, (A, N, B), dtype)
        for a in T.parallel(A):
            for n in range(N):
                for b in range(B):
                    if n == 0:
                        Y[a, n, b] = X[a, n, b]
                    else:
                        Y[a, n, b] = Y[a, n - 1, b] * X[a, n, b] if product else Y[a, n - 1, b] + X[a, n, b]

    return run


TABLE: dict[Any, Convert] = {
    _aten.sum.default: _reduce(_op.sum),
    _aten.sum.dim_IntList: _reduce(_op.sum),
    _aten.mean.default: _reduce(_op.mean),
    _aten.mean.dim: _reduce(_op.mean),
    _aten.prod.default: _reduce(_op.prod),
    _aten.prod.dim_int: _reduce(_op.prod),
    _aten.amax.default: _reduce(_op.max),
    _aten.amin.default: _reduce(_op.min),
    _aten.max.default: _reduce(_op.max),
    _aten.min.default: _reduce(_op.min),
    _aten.max.dim: _extreme(_op.max, _op.argmax),
    _aten.min.dim: _extreme(_op.min, _op.argmin),
    _aten.argmax.default: _place(_op.argmax),
    _aten.argmin.default: _place(_op.argmin),
    **dict.fromkeys((_aten.any.default, _aten.any.dim, _aten.any.dims), _any(_op.max)),
    **dict.fromkeys((_aten.all.default, _aten.all.dim, _aten.all.dims), _any(_op.min)),
    **dict.fromkeys((_aten.var.default, _aten.var.dim, _aten.var.correction), _variance(root=False)),
    **dict.fromkeys((_aten.std.default, _aten.std.dim, _aten.std.correction), _variance(root=True)),
    _aten.linalg_vector_norm.default: _norm,
    _aten.norm.ScalarOpt_dim: _norm,
    _aten.softmax.int: _softmax,
    _aten._softmax.default: _softmax,
    _aten.log_softmax.int: _log_softmax,
    _aten._log_softmax.default: _log_softmax,
    _aten.logsumexp.default: _log_sum_exp,
    _aten.adaptive_avg_pool1d.default: _adaptive_mean,
    _aten.adaptive_avg_pool2d.default: _adaptive_mean,
    _aten.cumsum.default: _running(product=False),
    _aten.cumprod.default: _running(product=True),
}
