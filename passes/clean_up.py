"""Back to ATen what stays dense, and out with what nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir.emit import Emitter, arguments, replace
from moeify.ir.inline import activate
from moeify.ir.metadata import tag
from moeify.ir.program import Program
from moeify.pipeline.base import Log, Pass

_aten = torch.ops.aten


@dataclass(frozen=True)
class CleanUp(Pass):
    """Expand every ``moe.ffn`` that is left, and drop dead nodes and the dense weights they read.

    Before:  y = moe.ffn(x, up, gate, down, up_bias, gate_bias, down_bias, "silu", 0.1)
    After:   y = linear(dropout(silu(linear(x, gate, gate_bias)) * linear(x, up, up_bias)), down, down_bias)

    A dense weight that a pending recipe still reads is dropped by ``Program.materialise`` instead.
    """

    name: ClassVar[str] = "clean-up"

    def apply(self, program: Program, log: Log) -> None:
        graph = program.graph
        dense = [n for n in graph.nodes if n.target == torch.ops.moeify.ffn.default]
        for node in dense:
            _expand(program, node)
        before = len(graph.nodes)
        graph.eliminate_dead_code()
        dropped = _drop_unread(program)
        graph.lint()
        program.graph_module.recompile()
        log(
            f"{len(dense)} moe.ffn expanded, {before - len(graph.nodes)} dead nodes and "
            f"{dropped} unread parameters dropped"
        )


def _expand(program: Program, node: fx.Node) -> None:
    given = arguments(node)
    mark = tag(node)
    assert mark is not None, f"{node.name} has no tag"
    role = mark.role if mark.role != "output" else "ffn"
    emit = Emitter(program, node, mark.block, mark.call, node)

    def linear(value: Any, name: str) -> fx.Node:
        return emit.call(role, _aten.linear.default, value, given[name], given[f"{name}_bias"])

    hidden = linear(given["x"], "up")
    if given["gate"] is None:
        hidden = activate(emit, given["activation"], hidden, role)
    else:
        gate = activate(emit, given["activation"], linear(given["x"], "gate"), role)
        hidden = emit.call(role, _aten.mul.Tensor, gate, hidden)
    if given["hidden_dropout"]:
        hidden = emit.call(role, _aten.dropout.default, hidden, given["hidden_dropout"], given["train"])
    replace(node, linear(hidden, "down"), mark.role)


def _drop_unread(program: Program) -> int:
    """Drop the dense parameters of converted blocks that neither the graph nor a pending recipe reads."""
    needed = {node.target for node in program.graph.find_nodes(op="get_attr")}
    needed.update(ref.parameter for recipe in program.pending.values() for ref in recipe.sources)
    dense = {ref.parameter for block in program.converted() for ref in block.weights.values()}
    # A module that occurs twice in the model has two names for each parameter: the other name keeps the memory alive.
    named = dict(program.graph_module.named_parameters(remove_duplicate=False))
    tensors = {id(named[name]) for name in dense if name in named}
    unread = [name for name, value in named.items() if id(value) in tensors and name not in needed]
    for name in unread:
        program.drop_parameter(name)
    return len(unread)
