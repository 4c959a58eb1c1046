"""Rules that the runner checks around passes. A broken rule is a bug of the pass and names the node."""

from __future__ import annotations

import torch
from torch import fx

from moeify.errors import BrokenProgram
from moeify.ir import metadata
from moeify.ir.program import Program
from moeify.ir.where import source_line


def lints(program: Program) -> None:
    """Nodes are in topological order, arguments exist, get_attr targets exist."""
    try:
        program.graph.lint()
    except (RuntimeError, AttributeError) as error:
        raise BrokenProgram(f"the graph does not lint: {error}") from error
    parameters = program.graph_module
    for node in program.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = node.target.rpartition(".")
            try:
                getattr(parameters.get_submodule(owner), leaf)
            except AttributeError as error:
                raise BrokenProgram(f"%{node.name} reads {node.target}, which does not exist") from error


def typed(program: Program) -> None:
    """Every call carries a fake result in ``meta["val"]`` unless it returns nothing."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            raise BrokenProgram(f"%{node.name} has no meta['val']", where=source_line(node))


def no_dead_operators(program: Program) -> None:
    """No ``moe.*`` call whose result nobody reads."""
    for node in program.graph.nodes:
        if is_moe(node) and not node.users:
            raise BrokenProgram(f"%{node.name} ({node.target}) is read by nothing")


def one_output_per_call(program: Program) -> None:
    """Each call of each block still in play has exactly one node tagged as its output."""
    seen: set[tuple[str, int]] = set()
    for node in program.graph.nodes:
        mark = metadata.tag(node)
        if mark is None or mark.role != "output":
            continue
        if (mark.block, mark.call) in seen:
            raise BrokenProgram(f"%{node.name} is a second output of call {mark.call} of {mark.block}")
        seen.add((mark.block, mark.call))
    for block in program.converted():
        for call in range(len(block.calls)):
            if (block.anchor, call) not in seen:
                raise BrokenProgram(f"call {call} of {block.anchor} has no output node")


ALWAYS = (lints, typed, no_dead_operators, one_output_per_call)


def is_moe(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "moeify"
