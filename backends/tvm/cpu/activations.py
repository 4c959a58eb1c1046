"""The named activations of the dialect as expressions of one float32, for kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeify.backends.tvm.cpu.mathematics import absolute, clamp, constant, erf, exp, expm1, let, log1p, select, sigmoid
from moeify.backends.tvm.cpu.mathematics import tanh as _tanh
from moeify.errors import UnknownName

Expr = Any

_SQRT_HALF = 0.7071067811865476
_TWO_SQRT_2_OVER_PI = 1.5957691216057308
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_SOFT_LIMIT = 20.0  # torch takes softplus(x) for x above it


def lookup(name: str) -> Callable[[Expr], Expr]:
    """The activation of that name. Raises UnknownName."""
    if name not in TABLE:
        raise UnknownName("activation", name, TABLE)
    function = TABLE[name]
    return lambda x: let(x, function)


def _zero_at_least(x: Expr) -> Expr:
    return select(x < constant(0), constant(0), x)


def _relu2(x: Expr) -> Expr:
    return let(_zero_at_least(x), lambda r: r * r)


def _gelu(x: Expr) -> Expr:
    return x * constant(0.5) * (constant(1) + erf(x * constant(_SQRT_HALF)))


def _gelu_tanh(x: Expr) -> Expr:
    # (1 + tanh(z)) / 2 = sigmoid(2 z): one division, and no cancellation below 0.
    return x * sigmoid(constant(_TWO_SQRT_2_OVER_PI) * (x + constant(0.044715) * (x * x * x)))


def _elu(x: Expr) -> Expr:
    return select(x > constant(0), x, expm1(x))


def _selu(x: Expr) -> Expr:
    return select(x > constant(0), constant(_SELU_SCALE) * x, constant(_SELU_SCALE * _SELU_ALPHA) * expm1(x))


def _mish(x: Expr) -> Expr:
    # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2); beyond the limit it is 1.
    def of(e: Expr) -> Expr:
        return let(e * (e + constant(2)), lambda n: x * (n / (n + constant(2))))

    return select(x > constant(_SOFT_LIMIT), x, let(exp(clamp(x, -104.0, _SOFT_LIMIT)), of))


def _softplus(x: Expr) -> Expr:
    return select(x > constant(_SOFT_LIMIT), x, log1p(exp(clamp(x, -104.0, _SOFT_LIMIT))))


def _hardsigmoid(x: Expr) -> Expr:
    return let(x + constant(3), lambda z: clamp(z, 0.0, 6.0)) * constant(1 / 6)


TABLE: dict[str, Callable[[Expr], Expr]] = {
    "identity": lambda x: x,
    "relu": _zero_at_least,
    "relu2": _relu2,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(constant(1.702) * x),
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "tanh": _tanh,
    "elu": _elu,
    "leaky_relu": lambda x: select(x > constant(0), x, x * constant(0.01)),
    "mish": _mish,
    "softplus": _softplus,
    "hardswish": lambda x: x * _hardsigmoid(x),
    "hardsigmoid": _hardsigmoid,
    "relu6": lambda x: clamp(x, 0.0, 6.0),
    "selu": _selu,
    "celu": _elu,
    "softsign": lambda x: x / (constant(1) + absolute(x)),
}
