"""Normalisation: layer, root mean square, batch and group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax

from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.emitter import shape_of

_aten = torch.ops.aten
_op = relax.op


def _optional(t: Translation, arg: Any, dtype: torch.dtype) -> Any:
    return None if arg is None else t.tensor(arg, dtype)


def _layer_norm(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value = args["input"].meta["val"]
    x = t.tensor(args["input"])
    weight, bias = (_optional(t, args[name], value.dtype) for name in ("weight", "bias"))
    over = len(args["normalized_shape"])
    if over == 1:
        own = t.families("layer_norm", t.emitter, x, weight, bias, float(args["eps"]))
        if own is not None:
            return own
    axes = list(range(value.dim() - over, value.dim()))
    return _affine(t, standardised(t, x, axes, args["eps"], value.dtype), weight, bias)


def _native_layer_norm(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    if any(user.args[1] != 0 for user in node.users):
        return NotImplemented  # something reads the mean
    return [_layer_norm(t, node, args), None, None]


def standardised(t: Translation, x: Any, axes: list[int], eps: float, dtype: torch.dtype) -> Any:
    """Less its mean and over its deviation, which are computed in two passes."""
    centre = t.emit(_op.subtract(x, t.emit(_op.mean(x, axes, keepdims=True))))
    variance = t.emit(_op.mean(t.emit(_op.multiply(centre, centre)), axes, keepdims=True))
    return t.emit(_op.multiply(centre, t.emit(_op.rsqrt(t.emit(_op.add(variance, t.tensor(float(eps), dtype)))))))


def _affine(t: Translation, x: Any, weight: Any, bias: Any) -> Any:
    if weight is not None:
        x = t.emit(_op.multiply(x, weight))
    return x if bias is None else t.emit(_op.add(x, bias))


def _rms_norm(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value = args["input"].meta["val"]
    x, weight, eps = t.tensor(args["input"]), _optional(t, args["weight"], value.dtype), args["eps"]
    eps = torch.finfo(value.dtype).eps if eps is None else float(eps)
    over = len(args["normalized_shape"])
    if over == 1:
        own = t.families("rms_norm", t.emitter, x, weight, eps)
        if own is not None:
            return own
    axes = list(range(value.dim() - over, value.dim()))
    square = t.emit(_op.mean(t.emit(_op.multiply(x, x)), axes, keepdims=True))
    scaled = t.emit(_op.multiply(x, t.emit(_op.rsqrt(t.emit(_op.add(square, t.tensor(eps, value.dtype)))))))
    return _affine(t, scaled, weight, None)


def _batch_norm(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """In evaluation: (x - mean) * weight / sqrt(var + eps) + bias, by channel."""
    if args.get("training", False) or args["running_mean"] is None:
        return NotImplemented
    value = args["input"].meta["val"]
    x = t.tensor(args["input"])
    shape = [1, shape_of(x)[1], *[1] * (value.dim() - 2)]
    mean, variance = (t.tensor(args[name], value.dtype) for name in ("running_mean", "running_var"))
    factor = t.emit(_op.rsqrt(t.emit(_op.add(variance, t.tensor(float(args["eps"]), value.dtype)))))
    weight, bias = (_optional(t, args[name], value.dtype) for name in ("weight", "bias"))
    if weight is not None:
        factor = t.emit(_op.multiply(factor, weight))
    offset = t.emit(_op.negative(t.emit(_op.multiply(mean, factor))))
    if bias is not None:
        offset = t.emit(_op.add(offset, bias))
    scaled = t.emit(_op.multiply(x, t.reshape(factor, shape)))
    return t.emit(_op.add(scaled, t.reshape(offset, shape)))


def _group_norm(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value = args["input"].meta["val"]
    x, groups = t.tensor(args["input"]), args["num_groups"]
    shape = shape_of(x)
    grouped = t.reshape(x, [shape[0], groups, shape[1] // groups, *shape[2:]])
    axes = list(range(2, value.dim() + 1))
    flat = t.reshape(standardised(t, grouped, axes, args["eps"], value.dtype), shape)
    channels = [1, shape[1], *[1] * (value.dim() - 2)]
    weight, bias = (
        None if args[name] is None else t.reshape(t.tensor(args[name], value.dtype), channels)
        for name in ("weight", "bias")
    )
    return _affine(t, flat, weight, bias)


TABLE: dict[Any, Convert] = {
    _aten.layer_norm.default: _layer_norm,
    _aten.native_layer_norm.default: _native_layer_norm,
    _aten.rms_norm.default: _rms_norm,
    _aten.batch_norm.default: _batch_norm,
    _aten.group_norm.default: _group_norm,
}
