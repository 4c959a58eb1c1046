"""Activations: each exactly as torch computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax

from moeify.backends.tvm.conversions.arithmetic import log_of_one_more
from moeify.backends.tvm.conversions.translation import Convert, Translation

_aten = torch.ops.aten
_op = relax.op


def named(node: fx.Node, args: Mapping[str, Any]) -> str | None:
    """The name, in moeify's list of activations, of what a node computes of its first argument; None for others."""
    if node.target == _aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}[args["approximate"]]
    return _NAMES.get(node.target)


_NAMES: dict[Any, str] = {
    _aten.relu.default: "relu",
    _aten.silu.default: "silu",
    _aten.sigmoid.default: "sigmoid",
    _aten.tanh.default: "tanh",
}


def _plain(op: Callable[[Any], Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        return t.emit(op(t.tensor(args["self"], node.meta["val"].dtype)))

    return convert


def _formula(of: Callable[[_Terms, Any, Mapping[str, Any]], Any]) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        dtype = node.meta["val"].dtype
        return of(_Terms(t, dtype), t.tensor(args["self"], dtype), args)

    return convert


class _Terms:
    """Arithmetic of tensors and numbers of one type."""

    def __init__(self, t: Translation, dtype: torch.dtype) -> None:
        self.t, self.dtype = t, dtype

    def __call__(self, op: Callable[..., Any], *operands: Any) -> Any:
        return self.t.emit(op(*(self.t.tensor(o, self.dtype) if isinstance(o, int | float) else o for o in operands)))

    def where(self, condition: Any, yes: Any, no: Any) -> Any:
        return self(_op.where, condition, yes, no)


def _gelu(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    return m(_op.nn.gelu if args["approximate"] == "none" else _op.nn.gelu_tanh, x)


def _elu(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    alpha, scale, rate = args["alpha"], args.get("scale", 1), args.get("input_scale", 1)
    grown = m(_op.subtract, m(_op.exp, m(_op.multiply, x, float(rate))), 1.0)
    return m.where(
        m(_op.greater, x, 0.0), m(_op.multiply, x, float(scale)), m(_op.multiply, grown, float(alpha * scale))
    )


def _selu(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    return _elu(m, x, {"alpha": 1.6732632423543772, "scale": 1.0507009873554805})


def _celu(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    return _elu(m, x, {"alpha": args["alpha"], "input_scale": 1 / args["alpha"]})


def _leaky_relu(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    return m.where(m(_op.greater, x, 0.0), x, m(_op.multiply, x, float(args["negative_slope"])))


def _prelu(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    m = _Terms(t, node.meta["val"].dtype)
    x, weight = t.tensor(args["self"]), t.tensor(args["weight"])
    rank = node.meta["val"].dim()
    if rank >= 2 and args["weight"].meta["val"].numel() > 1:
        weight = t.reshape(weight, [-1 if axis == 1 else 1 for axis in range(rank)])
    return m.where(m(_op.greater, x, 0.0), x, m(_op.multiply, x, weight))


def _softplus(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    """max(bx, 0) + log1p(exp(-|bx|)) does not overflow; above the threshold torch gives x."""
    beta = float(args["beta"])
    scaled = x if beta == 1 else m(_op.multiply, x, beta)
    tail = log_of_one_more(m.t, m(_op.exp, m(_op.negative, m(_op.abs, scaled))), m.dtype)
    soft = m(_op.add, m(_op.maximum, scaled, 0.0), tail)
    soft = soft if beta == 1 else m(_op.divide, soft, beta)
    return m.where(m(_op.greater, scaled, float(args["threshold"])), x, soft)


def _mish(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    """x * tanh(softplus(x)) = x * n / (n + 2) with n = e^x (e^x + 2); above 20 the factor is 1 in float32."""
    e = m(_op.exp, m(_op.minimum, x, 20.0))
    n = m(_op.multiply, e, m(_op.add, e, 2.0))
    return m(_op.multiply, x, m(_op.divide, n, m(_op.add, n, 2.0)))


def _softsign(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    m = _Terms(t, node.meta["val"].dtype)
    x = t.tensor(args["self"])
    return m(_op.divide, x, m(_op.add, m(_op.abs, x), 1.0))


def _sixth(m: _Terms, x: Any) -> Any:
    return m(_op.divide, m(_op.minimum, m(_op.maximum, m(_op.add, x, 3.0), 0.0), 6.0), 6.0)


def _hardsigmoid(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    return _sixth(m, x)


def _hardswish(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    return m(_op.multiply, x, _sixth(m, x))


def _hardtanh(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    low, high = float(args.get("min_val", 0.0)), float(args.get("max_val", 6.0))
    return m(_op.minimum, m(_op.maximum, x, low), high)


def _threshold(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    return m.where(m(_op.greater, x, float(args["threshold"])), x, float(args["value"]))


def _log_sigmoid(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    tail = log_of_one_more(m.t, m(_op.exp, m(_op.negative, m(_op.abs, x))), m.dtype)
    return m(_op.subtract, m(_op.minimum, x, 0.0), tail)


def _expm1(m: _Terms, x: Any, args: Mapping[str, Any]) -> Any:
    """By sinh: e^x - 1 = 2 e^(x/2) sinh(x/2), and sinh(y) = tanh(y) cosh(y) keeps the digits of a small y."""
    half = m(_op.multiply, x, 0.5)
    tanh = m(_op.tanh, half)
    near = m(_op.divide, m(_op.multiply, tanh, 2.0), m(_op.subtract, 1.0, tanh))
    far = m(_op.subtract, m(_op.exp, x), 1.0)
    return m.where(m(_op.less, m(_op.abs, x), 1.0), near, far)


TABLE: dict[Any, Convert] = {
    _aten.relu.default: _plain(_op.nn.relu),
    _aten.silu.default: _plain(_op.nn.silu),
    _aten.sigmoid.default: _plain(_op.sigmoid),
    _aten.tanh.default: _plain(_op.tanh),
    _aten.gelu.default: _formula(_gelu),
    _aten.elu.default: _formula(_elu),
    _aten.selu.default: _formula(_selu),
    _aten.celu.default: _formula(_celu),
    _aten.leaky_relu.default: _formula(_leaky_relu),
    _aten.prelu.default: _prelu,
    _aten._prelu_kernel.default: _prelu,
    _aten.softplus.default: _formula(_softplus),
    _aten.mish.default: _formula(_mish),
    _aten.hardsigmoid.default: _formula(_hardsigmoid),
    _aten.hardswish.default: _formula(_hardswish),
    _aten.hardtanh.default: _formula(_hardtanh),
    _aten.relu6.default: _formula(_hardtanh),
    _aten.threshold.default: _formula(_threshold),
    _aten.log_sigmoid.default: _formula(_log_sigmoid),
    _aten.expm1.default: _formula(_expm1),
}
