"""The named activations by their definitions, with functions called by name from the C library or the GPU's.

In float64 they are what the fast ones are held to; in float32 the CUDA kernels use them: TVM's own ``exp`` becomes
``__expf`` there, whose relative error grows with its argument, and ``expf`` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx

Expr = Any

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_SUFFIX = {"float32": "f", "float64": ""}  # of the library's functions


@dataclass(frozen=True)
class Definitions:
    """The activations on values of ``dtype``, "float32" or "float64"."""

    dtype: str

    def number(self, value: float) -> Expr:
        return tirx.const(value, self.dtype)

    def library(self, name: str, *arguments: Expr) -> Expr:
        """A function of the library, named as for doubles."""
        return tirx.call_pure_extern(self.dtype, name + _SUFFIX[self.dtype], *arguments)

    def table(self) -> Mapping[str, Callable[[Expr], Expr]]:
        """By the names of ``moeify.ir.activations``."""
        n, f = self.number, self.library
        return {
            "identity": lambda u: u,
            "relu": self._relu,
            "relu2": lambda u: self._relu(u) * self._relu(u),
            "gelu": lambda u: n(0.5) * u * (n(1) + f("erf", u * n(0.5**0.5))),
            "gelu_tanh": self._gelu_tanh,
            "quick_gelu": lambda u: u * self._sigmoid(n(1.702) * u),
            "silu": lambda u: u * self._sigmoid(u),
            "sigmoid": self._sigmoid,
            "tanh": lambda u: f("tanh", u),
            "elu": self._elu,
            "leaky_relu": lambda u: tirx.Select(u > n(0), u, u * n(0.01)),
            "mish": lambda u: u * f("tanh", self._softplus(u)),
            "softplus": self._softplus,
            "hardswish": lambda u: u * self._between(u + n(3), 0, 6) / n(6),
            "hardsigmoid": lambda u: self._between(u + n(3), 0, 6) / n(6),
            "relu6": lambda u: self._between(u, 0, 6),
            "selu": lambda u: n(_SELU_SCALE) * tirx.Select(u > n(0), u, n(_SELU_ALPHA) * f("expm1", u)),
            "celu": self._elu,
            "softsign": lambda u: u / (n(1) + f("fabs", u)),
        }

    def _sigmoid(self, u: Expr) -> Expr:
        return self.number(1) / (self.number(1) + self.library("exp", self.number(0) - u))

    def _between(self, u: Expr, low: float, high: float) -> Expr:
        least, most = self.number(low), self.number(high)
        return tirx.Select(u < least, least, tirx.Select(u > most, most, u))

    def _softplus(self, u: Expr) -> Expr:
        return tirx.Select(u > self.number(20), u, self.library("log1p", self.library("exp", u)))

    def _elu(self, u: Expr) -> Expr:
        return tirx.Select(u > self.number(0), u, self.library("expm1", u))

    def _gelu_tanh(self, u: Expr) -> Expr:
        z = self.number((2 / 3.141592653589793) ** 0.5) * (u + self.number(0.044715) * u * u * u)
        return self.number(0.5) * u * (self.number(1) + self.library("tanh", z))

    def _relu(self, u: Expr) -> Expr:
        return tirx.Select(u < self.number(0), self.number(0), u)
