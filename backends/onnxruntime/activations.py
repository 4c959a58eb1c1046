"""The activations of ``ir.activations`` in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from moeify.backends.onnxruntime.emit import Emitter
from moeify.errors import NotExportable
from moeify.ir.activations import TABLE

Build = Callable[[Emitter, ir.Value, ir.DataType], ir.Value]


# ONNX Runtime 1.31 has no float64 kernels of Erf, Elu, LeakyRelu, Softplus, HardSigmoid, Selu and Softsign.
_NO_FLOAT64 = frozenset(
    ("gelu", "elu", "leaky_relu", "mish", "softplus", "hardswish", "hardsigmoid", "selu", "celu", "softsign")
)


def activate(emit: Emitter, name: str, u: ir.Value, dtype: ir.DataType) -> ir.Value:
    """``TABLE[name](u)``; ``dtype`` is that of ``u``. Raises NotExportable for float64 where there is no kernel."""
    if dtype == ir.DataType.DOUBLE and name in _NO_FLOAT64:
        raise NotExportable(
            f"ONNX Runtime has no float64 kernel for the activation {name}",
            where=emit.prefix,
            hint="convert the model to float32 first",
        )
    return _BUILD[name](emit, u, dtype)


def _plain(op_type: str, **attributes: Any) -> Build:
    return lambda emit, u, dtype: emit.op(op_type, u, **attributes)


def _identity(emit: Emitter, u: ir.Value, dtype: ir.DataType) -> ir.Value:
    return u


def _relu2(emit: Emitter, u: ir.Value, dtype: ir.DataType) -> ir.Value:
    positive = emit.op("Relu", u)
    return emit.op("Mul", positive, positive)


def _silu(emit: Emitter, u: ir.Value, dtype: ir.DataType) -> ir.Value:
    return emit.op("Mul", u, emit.op("Sigmoid", u))  # ONNX Runtime fuses the two into one kernel


def _quick_gelu(emit: Emitter, u: ir.Value, dtype: ir.DataType) -> ir.Value:
    scaled = emit.op("Mul", u, emit.constant(1.702, dtype))
    return emit.op("Mul", u, emit.op("Sigmoid", scaled))


def _relu6(emit: Emitter, u: ir.Value, dtype: ir.DataType) -> ir.Value:
    return emit.op("Clip", u, emit.constant(0.0, dtype), emit.constant(6.0, dtype))


_BUILD: Mapping[str, Build] = {
    "identity": _identity,
    "relu": _plain("Relu"),
    "relu2": _relu2,
    "gelu": _plain("Gelu"),
    "gelu_tanh": _plain("Gelu", approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": _silu,
    "sigmoid": _plain("Sigmoid"),
    "tanh": _plain("Tanh"),
    "elu": _plain("Elu", alpha=1.0),
    "leaky_relu": _plain("LeakyRelu", alpha=0.01),
    "mish": _plain("Mish"),
    "softplus": _plain("Softplus"),
    "hardswish": _plain("HardSwish"),
    "hardsigmoid": _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    "relu6": _relu6,
    "selu": _plain("Selu"),
    "celu": _plain("Elu", alpha=1.0),  # equal at alpha 1; Celu is defined for float32 alone
    "softsign": _plain("Softsign"),
}
assert _BUILD.keys() == TABLE.keys(), sorted(_BUILD.keys() ^ TABLE.keys())
