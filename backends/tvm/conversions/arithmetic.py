"""Pointwise operators: arithmetic, comparisons, logic, selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax

from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.emitter import dtype_of

_aten = torch.ops.aten
_op = relax.op


def _common(node: fx.Node, left: Any, right: Any) -> torch.dtype:
    """The type in which torch computes with two operands."""
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in (left, right)]
    values = [1 if isinstance(v, torch.SymInt) else v for v in values]  # int() would fix the size
    if not any(isinstance(v, torch.Tensor) for v in values):
        result: torch.dtype = node.meta["val"].dtype
        return result
    return torch.result_type(*values)


def operands(t: Translation, node: fx.Node, left: Any, right: Any, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Both as tensors of the type in which torch computes, of shapes that TVM sees to broadcast."""
    dtype = dtype or _common(node, left, right)
    shape = t.shape(node)
    a, b = (t.tensor(arg, dtype) for arg in (left, right))
    return t.aligned(a, shape), t.aligned(b, shape)


def _unary(op: Callable[[Any], Any]) -> Convert:
    """Of a floating-point result: integers are converted first."""

    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        return t.emit(op(t.tensor(args["self"], node.meta["val"].dtype)))

    return convert


def _binary(op: Callable[[Any, Any], Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        return t.emit(op(*operands(t, node, args["self"], args["other"])))

    return convert


def compare(op: Callable[[Any, Any], Any]) -> Convert:
    """Booleans as numbers: LLVM gets a comparison of floats for them."""

    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        left, right = operands(t, node, args["self"], args["other"])
        if dtype_of(left) == "bool":
            left, right = t.cast(left, torch.int8), t.cast(right, torch.int8)
        return t.emit(op(left, right))

    return convert


def _add(op: Callable[[Any, Any], Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        left, right = operands(t, node, args["self"], args["other"])
        if args.get("alpha", 1) != 1:
            right = t.emit(_op.multiply(right, t.tensor(args["alpha"], node.meta["val"].dtype)))
        return t.emit(op(left, right))

    return convert


def _multiply(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    left, right = operands(t, node, args["self"], args["other"])
    both = node.meta["val"].dtype == torch.bool
    return t.emit(_op.logical_and(left, right) if both else _op.multiply(left, right))


def _rsub(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    left, right = operands(t, node, args["self"], args["other"])
    if args.get("alpha", 1) != 1:
        left = t.emit(_op.multiply(left, t.tensor(args["alpha"], node.meta["val"].dtype)))
    return t.emit(_op.subtract(right, left))


def _divide(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dtype = node.meta["val"].dtype
    left, right = operands(t, node, args["self"], args["other"], dtype)
    mode = args.get("rounding_mode")
    if mode == "floor":
        return t.emit(_op.floor_divide(left, right))
    if mode == "trunc" and not dtype.is_floating_point:
        return NotImplemented  # Relax divides integers by rounding down
    quotient = t.emit(_op.divide(left, right))
    return t.emit(_op.trunc(quotient)) if mode == "trunc" else quotient


def _power(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    exponent, dtype = args["exponent"], node.meta["val"].dtype
    if isinstance(exponent, int | float) and exponent == int(exponent) and 1 <= exponent <= 4:
        base = t.tensor(args["self"], dtype)
        result = base
        for _ in range(int(exponent) - 1):
            result = t.emit(_op.multiply(result, base))
        return result
    if not dtype.is_floating_point:
        return NotImplemented
    if exponent == 0.5:
        return t.emit(_op.sqrt(t.tensor(args["self"], dtype)))
    if exponent == -0.5:
        return t.emit(_op.rsqrt(t.tensor(args["self"], dtype)))
    if exponent == -1:
        return t.emit(_op.divide(t.tensor(1.0, dtype), t.tensor(args["self"], dtype)))
    return t.emit(_op.power(*operands(t, node, args["self"], exponent, dtype)))


def _reciprocal(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dtype = node.meta["val"].dtype
    return t.emit(_op.divide(t.tensor(1.0, dtype), t.tensor(args["self"], dtype)))


def _log1p(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dtype = node.meta["val"].dtype
    x = t.tensor(args["self"], dtype)
    infinite = t.emit(_op.equal(x, t.tensor(math.inf, dtype)))
    return t.emit(_op.where(infinite, x, log_of_one_more(t, x, dtype)))


def log_of_one_more(t: Translation, x: Any, dtype: torch.dtype) -> Any:
    """log(1 + x) of a finite x, with the digits of a small one.

    Kahan's: log(u) * x / (u - 1) with u = 1 + x (Goldberg, "What Every Computer Scientist Should Know About
    Floating-Point Arithmetic", 1991, theorem 4).
    """
    one = t.tensor(1.0, dtype)
    u = t.emit(_op.add(one, x))
    less = t.emit(_op.subtract(u, one))
    same = t.emit(_op.equal(less, t.tensor(0.0, dtype)))
    ratio = t.emit(_op.divide(x, t.emit(_op.where(same, one, less))))
    return t.emit(_op.where(same, x, t.emit(_op.multiply(t.emit(_op.log(u)), ratio))))


def _scaled_log(factor: float) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        dtype = node.meta["val"].dtype
        return t.emit(_op.multiply(t.emit(_op.log(t.tensor(args["self"], dtype))), t.tensor(factor, dtype)))

    return convert


_UNARY: dict[Any, Callable[[Any], Any]] = {
    _aten.abs.default: _op.abs,
    _aten.acos.default: _op.acos,
    _aten.asin.default: _op.asin,
    _aten.atan.default: _op.atan,
    _aten.ceil.default: _op.ceil,
    _aten.cos.default: _op.cos,
    _aten.cosh.default: _op.cosh,
    _aten.erf.default: _op.erf,
    _aten.exp.default: _op.exp,
    _aten.floor.default: _op.floor,
    _aten.log.default: _op.log,
    _aten.neg.default: _op.negative,
    _aten.round.default: _op.round,
    _aten.rsqrt.default: _op.rsqrt,
    _aten.sign.default: _op.sign,
    _aten.sin.default: _op.sin,
    _aten.sinh.default: _op.sinh,
    _aten.sqrt.default: _op.sqrt,
    _aten.square.default: _op.square,
    _aten.tan.default: _op.tan,
    _aten.trunc.default: _op.trunc,
}

_COMPARISONS = {
    "eq": _op.equal,
    "ne": _op.not_equal,
    "lt": _op.less,
    "le": _op.less_equal,
    "gt": _op.greater,
    "ge": _op.greater_equal,
}

TABLE: dict[Any, Convert] = {
    **{op: _unary(of) for op, of in _UNARY.items()},
    **{
        getattr(getattr(_aten, n), kind): compare(of) for n, of in _COMPARISONS.items() for kind in ("Tensor", "Scalar")
    },
    _aten.add.Tensor: _add(_op.add),
    _aten.add.Scalar: _add(_op.add),
    _aten.sub.Tensor: _add(_op.subtract),
    _aten.sub.Scalar: _add(_op.subtract),
    _aten.rsub.Tensor: _rsub,
    _aten.rsub.Scalar: _rsub,
    _aten.mul.Tensor: _multiply,
    _aten.mul.Scalar: _multiply,
    _aten.div.Tensor: _divide,
    _aten.div.Scalar: _divide,
    _aten.div.Tensor_mode: _divide,
    _aten.div.Scalar_mode: _divide,
    _aten.floor_divide.default: _binary(_op.floor_divide),
    _aten.remainder.Tensor: _binary(_op.floor_mod),
    _aten.remainder.Scalar: _binary(_op.floor_mod),
    _aten.maximum.default: _binary(_op.maximum),
    _aten.minimum.default: _binary(_op.minimum),
    _aten.max.other: _binary(_op.maximum),
    _aten.min.other: _binary(_op.minimum),
    _aten.pow.Tensor_Scalar: _power,
    _aten.pow.Tensor_Tensor: _power,
    _aten.pow.Scalar: _power,
    _aten.reciprocal.default: _reciprocal,
    _aten.log1p.default: _log1p,
    _aten.log2.default: _scaled_log(1 / math.log(2)),
    _aten.log10.default: _scaled_log(1 / math.log(10)),
}
