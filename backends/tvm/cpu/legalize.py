"""Pointwise Relax operators with vectorised mathematics of our own, where TVM's would call the C library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, te, topi

from moeify.backends.tvm.cpu import mathematics
from moeify.backends.tvm.cpu.activations import lookup

Function = Callable[[Any], Any]


def table() -> dict[str, Any]:
    """For ``relax.transform.LegalizeOps``."""
    functions: dict[str, Function] = {
        "relax.exp": mathematics.exp,
        "relax.log": mathematics.log,
        "relax.tanh": mathematics.tanh,
        "relax.erf": mathematics.erf,
        "relax.sigmoid": mathematics.sigmoid,
        "relax.nn.gelu": lookup("gelu"),
        "relax.nn.gelu_tanh": lookup("gelu_tanh"),
        "relax.nn.silu": lookup("silu"),
    }
    return {name: _pointwise(name, function) for name, function in functions.items()}


def _pointwise(name: str, function: Function) -> Any:
    """Legalise by that function in float32, and as TVM does in other types."""
    label = name.rsplit(".", 1)[1]

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> Any:
        (x,) = call.args
        if str(x.ty.dtype) != "float32":
            return _default(builder, call)

        def compute(x: Any) -> Any:
            return te.compute(x.shape, lambda *i: mathematics.let(x(*i), function), label, tag=topi.tag.ELEMWISE)

        return builder.call_te(compute, x, primfunc_name_hint=label)

    return legalize


def _default(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    return call.op.get_attr("FLegalize")(builder, call)
