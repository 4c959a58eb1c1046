"""Pointwise logic, and what is chosen by it: masks, limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax

from moeify.backends.tvm.conversions.arithmetic import operands
from moeify.backends.tvm.conversions.translation import Convert, Translation

_aten = torch.ops.aten
_op = relax.op


def _differ(left: Any, right: Any) -> Any:
    """Of booleans, as numbers: LLVM gets a comparison of floats for them."""
    return _op.not_equal(_op.astype(left, "int8"), _op.astype(right, "int8"))


def _logical(op: Callable[[Any, Any], Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        return t.emit(op(*operands(t, node, args["self"], args["other"], torch.bool)))

    return convert


def _bitwise(on_bools: Callable[[Any, Any], Any], on_ints: Callable[[Any, Any], Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        op = on_bools if node.meta["val"].dtype == torch.bool else on_ints
        return t.emit(op(*operands(t, node, args["self"], args["other"])))

    return convert


def _not(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x = t.tensor(args["self"], torch.bool if node.target == _aten.logical_not.default else None)
    return t.emit(_op.logical_not(x) if node.meta["val"].dtype == torch.bool else _op.bitwise_not(x))


def _where(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dtype, shape = node.meta["val"].dtype, t.shape(node)
    condition = t.aligned(t.tensor(args["condition"], torch.bool), shape)
    left, right = (t.aligned(t.tensor(args[name], dtype), shape) for name in ("self", "other"))
    return t.emit(_op.where(condition, left, right))


def _masked_fill(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dtype, shape = node.meta["val"].dtype, t.shape(node)
    mask = t.aligned(t.tensor(args["mask"], torch.bool), shape)
    return t.emit(_op.where(mask, t.tensor(args["value"], dtype), t.aligned(t.tensor(args["self"], dtype), shape)))


def _clamp(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dtype, shape = node.meta["val"].dtype, t.shape(node)
    x = t.aligned(t.tensor(args["self"], dtype), shape)
    for name, op in (("min", _op.maximum), ("max", _op.minimum)):
        bound = args.get(name)
        if bound is not None and not (
            isinstance(bound, float) and math.isinf(bound) and (bound < 0) == (name == "min")
        ):
            x = t.emit(op(x, t.aligned(t.tensor(bound, dtype), shape)))
    return x


def _is_infinite(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x = t.tensor(args["self"])
    return t.emit(_op.equal(t.emit(_op.abs(x)), t.tensor(math.inf, args["self"].meta["val"].dtype)))


def _test(op: Callable[[Any], Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        return t.emit(op(t.tensor(args["self"])))

    return convert


TABLE: dict[Any, Convert] = {
    _aten.logical_and.default: _logical(_op.logical_and),
    _aten.logical_or.default: _logical(_op.logical_or),
    _aten.logical_xor.default: _logical(_differ),
    _aten.logical_not.default: _not,
    _aten.bitwise_not.default: _not,
    **{
        getattr(getattr(_aten, name), kind): _bitwise(on_bools, on_ints)
        for names, on_bools, on_ints in (
            (("bitwise_and", "__and__"), _op.logical_and, _op.bitwise_and),
            (("bitwise_or", "__or__"), _op.logical_or, _op.bitwise_or),
            (("bitwise_xor", "__xor__"), _differ, _op.bitwise_xor),
        )
        for name in names
        for kind in ("Tensor", "Scalar")
    },
    _aten.isnan.default: _test(_op.isnan),
    _aten.isinf.default: _is_infinite,
    _aten.where.self: _where,
    _aten.where.ScalarSelf: _where,
    _aten.where.ScalarOther: _where,
    _aten.where.Scalar: _where,
    _aten.masked_fill.Scalar: _masked_fill,
    _aten.masked_fill.Tensor: _masked_fill,
    _aten.clamp.default: _clamp,
    _aten.clamp.Tensor: _clamp,
    _aten.clamp_min.default: _clamp,
    _aten.clamp_min.Tensor: _clamp,
    _aten.clamp_max.default: _clamp,
    _aten.clamp_max.Tensor: _clamp,
}
