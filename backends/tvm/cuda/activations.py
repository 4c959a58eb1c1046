"""The named activations on float32 values, with the device's accurate functions.

The functions are called by name (``expf``): TVM's own ``exp`` becomes ``__expf`` on CUDA, whose relative error grows
with its argument. The C library has them under the same names, so that a kernel computes the same on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

Expr = Any

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def number(value: float) -> Expr:
    return tirx.const(value, "float32")


def library(name: str, *arguments: Expr) -> Expr:
    """A function of the CUDA math library, of the C library on a CPU."""
    return tirx.call_pure_extern("float32", name, *arguments)


def _sigmoid(u: Expr) -> Expr:
    return number(1) / (number(1) + library("expf", number(0) - u))


def _between(u: Expr, low: float, high: float) -> Expr:
    return tirx.Select(u < number(low), number(low), tirx.Select(u > number(high), number(high), u))


def _softplus(u: Expr) -> Expr:
    return tirx.Select(u > number(20), u, library("log1pf", library("expf", u)))


def _elu(u: Expr) -> Expr:
    return tirx.Select(u > number(0), u, library("expm1f", u))


def _gelu_tanh(u: Expr) -> Expr:
    z = number((2 / 3.141592653589793) ** 0.5) * (u + number(0.044715) * u * u * u)
    return number(0.5) * u * (number(1) + library("tanhf", z))


def _relu(u: Expr) -> Expr:
    return tirx.Select(u < number(0), number(0), u)


TABLE: dict[str, Callable[[Expr], Expr]] = {
    "identity": lambda u: u,
    "relu": _relu,
    "relu2": lambda u: _relu(u) * _relu(u),
    "gelu": lambda u: number(0.5) * u * (number(1) + library("erff", u * number(0.5**0.5))),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda u: u * _sigmoid(number(1.702) * u),
    "silu": lambda u: u * _sigmoid(u),
    "sigmoid": _sigmoid,
    "tanh": lambda u: library("tanhf", u),
    "elu": _elu,
    "leaky_relu": lambda u: tirx.Select(u > number(0), u, u * number(0.01)),
    "mish": lambda u: u * library("tanhf", _softplus(u)),
    "softplus": _softplus,
    "hardswish": lambda u: u * _between(u + number(3), 0, 6) / number(6),
    "hardsigmoid": lambda u: _between(u + number(3), 0, 6) / number(6),
    "relu6": lambda u: _between(u, 0, 6),
    "selu": lambda u: number(_SELU_SCALE) * tirx.Select(u > number(0), u, number(_SELU_ALPHA) * library("expm1f", u)),
    "celu": _elu,
    "softsign": lambda u: u / (number(1) + library("fabsf", u)),
}
