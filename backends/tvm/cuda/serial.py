"""A CUDA kernel as a plain function: the same loops and index arithmetic, one thread after another.

For checking on a CPU what a kernel computes. Barriers and races are not seen this way: a phase is finished here before
the next begins.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

from moeify.backends.tvm.cuda.statements import rewrite


def serial(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with loops over threads and blocks made plain ones."""

    def change(node: Any) -> Any:
        if isinstance(node, tirx.For) and node.kind == tirx.ForKind.THREAD_BINDING:
            return tirx.For(node.loop_var, node.min, node.extent, tirx.ForKind.SERIAL, node.body)
        return node

    return function.with_body(rewrite(function.body, change))


def serial_module(mod: tvm.IRModule) -> tvm.IRModule:
    """A copy of a module with all its kernels serial: what a CPU can be asked to compute in a GPU's place."""
    plain = mod.clone()
    for variable, function in list(plain.functions.items()):
        if isinstance(function, tirx.PrimFunc):
            plain.update_func(variable, serial(function))
    return plain
