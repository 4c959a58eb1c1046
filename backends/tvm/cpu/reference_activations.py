"""The named activations by their definitions, in float64 and with the C library: what the fast ones are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

Expr = Any

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def number(value: float) -> Expr:
    return tirx.const(value, "float64")


def library(name: str, *arguments: Expr) -> Expr:
    """A function of the C library."""
    return tirx.call_pure_extern("float64", name, *arguments)


def _sigmoid(u: Expr) -> Expr:
    return number(1) / (number(1) + library("exp", number(0) - u))


def _between(u: Expr, low: float, high: float) -> Expr:
    return tirx.Select(u < number(low), number(low), tirx.Select(u > number(high), number(high), u))


def _softplus(u: Expr) -> Expr:
    return tirx.Select(u > number(20), u, library("log1p", library("exp", u)))


def _elu(u: Expr) -> Expr:
    return tirx.Select(u > number(0), u, library("expm1", u))


def _gelu_tanh(u: Expr) -> Expr:
    z = number((2 / 3.141592653589793) ** 0.5) * (u + number(0.044715) * u * u * u)
    return number(0.5) * u * (number(1) + library("tanh", z))


def _relu(u: Expr) -> Expr:
    return tirx.Select(u < number(0), number(0), u)


TABLE: dict[str, Callable[[Expr], Expr]] = {
    "identity": lambda u: u,
    "relu": _relu,
    "relu2": lambda u: _relu(u) * _relu(u),
    "gelu": lambda u: number(0.5) * u * (number(1) + library("erf", u * number(0.5**0.5))),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda u: u * _sigmoid(number(1.702) * u),
    "silu": lambda u: u * _sigmoid(u),
    "sigmoid": _sigmoid,
    "tanh": lambda u: library("tanh", u),
    "elu": _elu,
    "leaky_relu": lambda u: tirx.Select(u > number(0), u, u * number(0.01)),
    "mish": lambda u: u * library("tanh", _softplus(u)),
    "softplus": _softplus,
    "hardswish": lambda u: u * _between(u + number(3), 0, 6) / number(6),
    "hardsigmoid": lambda u: _between(u + number(3), 0, 6) / number(6),
    "relu6": lambda u: _between(u, 0, 6),
    "selu": lambda u: number(_SELU_SCALE) * tirx.Select(u > number(0), u, number(_SELU_ALPHA) * library("expm1", u)),
    "celu": _elu,
    "softsign": lambda u: u / (number(1) + library("fabs", u)),
}
