"""What lowerings emit into: the Relax function under construction, its kernels and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from moeify.backends.tvm.machine import Machine
from moeify.backends.tvm.weights import Weights

# Passes leave such kernels as they are, and FuseOps puts nothing into them.
_OWN = {"op_pattern": 8, "tirx.is_scheduled": True}


class Emitter:
    """One Relax function ``main`` being built.

    ``builder`` is the relax.BlockBuilder inside a dataflow block, ``weights`` the parameters asked for so far.
    """

    def __init__(self, builder: relax.BlockBuilder, machine: Machine, weights: Weights) -> None:
        self.builder = builder
        self.machine = machine
        self.weights = weights
        self._kernels: dict[str, Any] = {}

    def emit(self, expr: Any) -> relax.Var:
        """Bind an expression to a variable."""
        return self.builder.emit(expr)

    def kernel(self, name: str, make: Callable[[], tirx.PrimFunc]) -> Any:
        """The kernel of that name, made by ``make`` the first time: ``name`` must tell all its constants.

        Gives a GlobalVar for ``call``.
        """
        if name not in self._kernels:
            function = _in_a_block(make()).with_attr("global_symbol", name).with_attrs(_OWN)
            self._kernels[name] = self.builder.add_func(function, name)
        return self._kernels[name]

    def call(self, kernel: Any, arguments: Sequence[Any], out: Any) -> relax.Var:
        """Call a kernel in destination-passing style. ``out`` is the type of its result, or a list of types."""
        return self.emit(relax.call_tir(kernel, list(arguments), out))


def _in_a_block(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The same with its body in a root block: TVM's search for reshapes fails on a kernel that has none."""
    if isinstance(function.body, s_tir.SBlockRealize):
        return function
    return function.with_body(s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", function.body)))


def shape_of(expr: Any) -> list[Any]:
    """The sizes of a tensor expression: ints where they are fixed, tirx expressions where not."""
    return [int(s) if isinstance(s, int | tirx.IntImm) else s for s in expr.ty.shape.values]


def dtype_of(expr: Any) -> str:
    return str(expr.ty.dtype)


def rows(emitter: Emitter, x: Any) -> tuple[Any, list[Any]]:
    """``[..., D]`` as ``[T, D]`` without a copy, and the leading sizes for ``relax.op.reshape`` back."""
    *leading, width = shape_of(x)
    if len(leading) == 1:
        return x, leading
    total: Any = 1
    for size in leading:
        total = total * size
    if not isinstance(total, int):
        total = tvm.sym.Analyzer().simplify(total)
    return emitter.emit(relax.op.reshape(x, (total, width))), leading
