"""One dimension for each buffer, without the rewriting of indices that is wrong in TVM 0.27.

``FlattenBuffer`` puts indices together as sums over loop variables. Where one is divided that was shifted first, as in
``f // 8 * 4 + (f % 8 + 1) // 2``, which a padded or concatenated input of a repetition reads, it gives
``(f + 1) // 2 - 4``: bytes before the buffer. Here the loops' variables are hidden from it; the simplifier, which
rewrites such sums correctly, follows.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx


def flatten() -> tvm.transform.Pass:
    """For functions without blocks; indices come out simplified."""
    return tvm.transform.Sequential([_hide_loops(), tirx.transform.FlattenBuffer(), s_tir.transform.StmtSimplify()])


def _hide_loops() -> Any:
    @tirx.transform.prim_func_pass(opt_level=0)
    def hide_loops(function: tirx.PrimFunc, _mod: Any, _context: Any) -> tirx.PrimFunc:
        return function.with_body(_hidden(function.body))

    return hide_loops


def _hidden(statement: Any) -> Any:
    """Each loop over a variable of another name, from which its body's first statement takes the old one's value."""
    if isinstance(statement, tirx.For):
        variable = tirx.Var(statement.loop_var.name, statement.loop_var.ty)
        body = tirx.SeqStmt([tirx.Bind(statement.loop_var, variable), _hidden(statement.body)])
        return tirx.For(
            variable,
            statement.min,
            statement.extent,
            statement.kind,
            body,
            statement.thread_binding,
            statement.annotations,
            statement.step,
        )
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_hidden(one) for one in statement.seq])
    if isinstance(statement, tirx.IfThenElse):
        otherwise = None if statement.else_case is None else _hidden(statement.else_case)
        return tirx.IfThenElse(statement.condition, _hidden(statement.then_case), otherwise)
    if isinstance(statement, tirx.AttrStmt):
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, _hidden(statement.body))
    if isinstance(statement, tirx.While):
        return tirx.While(statement.condition, _hidden(statement.body))
    return statement
