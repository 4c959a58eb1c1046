"""Transposes that undo each other: attention gives the transpose of what it wrote, and models transpose that back."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op
from tvm.relax.expr_functor import PyExprMutator, mutator


@tvm.transform.module_pass(opt_level=0, name="CancelTransposes")
class Cancel:
    """``permute_dims(permute_dims(x, p), q)`` becomes ``x`` where q undoes p."""

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        canceller = _Canceller(mod)
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                canceller.builder_.update_func(variable, canceller.visit_expr(function))
        return canceller.builder_.get()


@mutator
class _Canceller(PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if not _is_transpose(call) or not isinstance(call.args[0], relax.Var):
            return call
        inner = self.lookup_binding(call.args[0])
        if inner is None or not _is_transpose(inner):
            return call
        first, second = _axes(inner), _axes(call)
        return inner.args[0] if [first[axis] for axis in second] == sorted(first) else call


def _is_transpose(expr: Any) -> bool:
    return isinstance(expr, relax.Call) and expr.op == Op.get("relax.permute_dims")


def _axes(call: relax.Call) -> list[int]:
    rank = len(call.args[0].ty.shape)
    axes = call.attrs.axes
    return list(reversed(range(rank))) if axes is None else [int(axis) for axis in axes]
