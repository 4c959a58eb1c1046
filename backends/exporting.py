"""A Program as an ExportedProgram in eval mode: what every backend starts from, and the shape check of the rewrite."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import NotExportable
from moeify.ir.modes import set_training
from moeify.ir.program import Program

_aten = torch.ops.aten
_moe = torch.ops.moeify

# What each of them is in evaluation.
_NOISE = {
    _moe.jitter_like.default: _aten.ones_like.default,
    _moe.normal_like.default: _aten.zeros_like.default,
    _moe.gumbel_like.default: _aten.zeros_like.default,
    _moe.uniform_like.default: _aten.zeros_like.default,
}

SYMBOL = re.compile(r"\b[su]\d+\b")  # torch's names of sizes


def rename_symbols(text: str, names: Mapping[str, str]) -> str:
    """A size as text with the user's names in the place of torch's symbols: ``s72*s70`` becomes ``batch*seq``."""
    return SYMBOL.sub(lambda found: names.get(found[0], found[0]), text)


def export(program: Program) -> torch.export.ExportedProgram:
    """The program as an ExportedProgram in eval mode, dynamic where its inputs are. ``program`` stays as it is.

    Raises NotExportable when a dimension that the program says is dynamic turns out to be fixed: what is written from
    it would take inputs of the example's size alone.
    """
    if program.pending:
        program.materialise()
    still = program.clone()
    set_training(still.graph_module, False)
    dynamic = tuple(
        {dim: torch.export.Dim.AUTO for dim, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in still.inputs
    )
    exported = torch.export.export(still.graph_module, still.example, dynamic_shapes=dynamic, strict=False)
    _check_dynamic(exported, program)
    return exported


def _check_dynamic(exported: torch.export.ExportedProgram, program: Program) -> None:
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    for spec, name in zip(program.inputs, exported.graph_signature.user_inputs, strict=True):
        for dim, (want, have) in enumerate(zip(spec.shape, placeholders[str(name)].meta["val"].shape, strict=True)):
            if isinstance(want, str) and is_concrete_int(have):
                raise NotExportable(
                    f"dimension {dim} of the input {spec.name}, {want}, is fixed at {have} by torch.export",
                    hint=f"torch.export fixes sizes of 0 and 1: capture the model with an example of {want} >= 2"
                    if have < 2
                    else f"give {spec.name} its fixed size, {have}, in the place of {want}",
                )


def drop_router_noise(program: Program) -> None:
    """Take out, in place, what routers do in training alone: noise, which is ones or zeros in evaluation, with what
    only scales or adds it, and balanced choices.

    Before:  clean + moe.normal_like(clean, False) * deviation;   x * moe.jitter_like(x, eps, False)
    After:   clean;                                               x
    Before:  moe.balanced_assignment(scores, False);   moe.sinkhorn(scores, epsilon, 50, False)
    After:   argmax(scores, 1);                        scores
    """
    graph = program.graph
    noise = [node for node in graph.nodes if node.target in _NOISE]
    for node in noise:
        if node.target == _moe.jitter_like.default:
            _skip(node, _aten.mul.Tensor)
        else:
            for product in [user for user in node.users if user.target == _aten.mul.Tensor]:
                _skip(product, _aten.add.Tensor)
            _skip(node, _aten.add.Tensor)
        if node.users:
            _put(node, _NOISE[node.target], node.args[0])
    for node in graph.find_nodes(op="call_function", target=_moe.balanced_assignment.default):
        _put(node, _aten.argmax.default, node.args[0], 1)
    for node in graph.find_nodes(op="call_function", target=_moe.sinkhorn.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    # Random operators are impure to fx, which keeps them when nothing reads them.
    graph.eliminate_dead_code(lambda node: node.is_impure() and node not in noise)
    program.graph_module.recompile()


def _put(old: fx.Node, op: object, *args: object) -> None:
    """An operator of the same result in the place of a node."""
    with old.graph.inserting_before(old):
        new = old.graph.call_function(op, args)  # type: ignore[arg-type]
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)


def _skip(node: fx.Node, through: object) -> None:
    """Replace ``through(x, node)`` by ``x`` wherever the two have one shape."""
    for user in list(node.users):
        if user.target != through or len(user.args) != 2 or user.kwargs:
            continue
        other = next((arg for arg in user.args if arg is not node), None)
        if isinstance(other, fx.Node) and other.meta["val"].shape == user.meta["val"].shape:
            user.replace_all_uses_with(other)
