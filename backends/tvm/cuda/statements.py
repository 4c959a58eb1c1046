"""Rewriting the statements of a kernel: TVM 0.27 has no such visitor in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import s_tir, tirx


def rewrite(statement: Any, change: Callable[[Any], Any]) -> Any:
    """The statement with ``change`` applied to every loop and block in it, the innermost first."""
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([rewrite(one, change) for one in statement.seq])
    if isinstance(statement, tirx.IfThenElse):
        other = statement.else_case
        return tirx.IfThenElse(
            statement.condition,
            rewrite(statement.then_case, change),
            None if other is None else rewrite(other, change),
        )
    if isinstance(statement, tirx.For):
        return change(
            tirx.For(
                statement.loop_var,
                statement.min,
                statement.extent,
                statement.kind,
                rewrite(statement.body, change),
                statement.thread_binding,
                statement.annotations,
            )
        )
    if isinstance(statement, s_tir.SBlockRealize):
        return s_tir.SBlockRealize(statement.iter_values, statement.predicate, rewrite(statement.block, change))
    if isinstance(statement, s_tir.SBlock):
        return change(
            s_tir.SBlock(
                statement.iter_vars,
                statement.reads,
                statement.writes,
                statement.name_hint,
                rewrite(statement.body, change),
                statement.init,
                statement.alloc_buffers,
                statement.match_buffers,
                statement.annotations,
            )
        )
    assert isinstance(statement, tirx.BufferStore | tirx.Evaluate | tirx.Bind), type(statement)
    return statement
