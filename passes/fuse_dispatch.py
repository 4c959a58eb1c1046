"""The three steps of a dispatch into one operator, where nothing stands between them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir.emit import Emitter, arguments, replace
from moeify.ir.metadata import tag
from moeify.ir.program import Program
from moeify.pipeline.base import Log, Pass

_moe = torch.ops.moeify
_WEIGHTS = ("up_EFD", "gate_EFD", "down_EDF", "up_bias_EF", "gate_bias_EF", "down_bias_ED")


@dataclass(frozen=True)
class FuseDispatch(Pass):
    """Fold permute, experts and unpermute into one ``moe.dispatch_ffn``, which backends lower.

    Before:  rows, counts, order = moe.permute(x_TD, experts_TK, E)
             y_TD = moe.unpermute(moe.experts(rows, counts, up_EFD, ...), order, weights_TK)
    After:   y_TD = moe.dispatch_ffn(x_TD, experts_TK, weights_TK, up_EFD, ...)
    """

    name: ClassVar[str] = "fuse-dispatch"

    def apply(self, program: Program, log: Log) -> None:
        fused = 0
        for node in list(program.graph.nodes):
            if node.target != _moe.unpermute.default:
                continue
            reason = _fuse(program, node)
            if reason is None:
                fused += 1
            else:
                log(f"{_where(program, node)} stays in three steps: {reason}")
        program.graph_module.recompile()
        log(f"{fused} dispatches fused")


def _fuse(program: Program, unpermute: fx.Node) -> str | None:
    """Rewrite one dispatch, or say why not."""
    experts, order, weights_TK = unpermute.args[:3]
    assert isinstance(experts, fx.Node)
    assert isinstance(order, fx.Node)
    if experts.target != _moe.experts.default:
        return _why_in_steps(program, unpermute, experts)
    given = arguments(experts)
    parts = [given["rows_RD"], given["counts_E"], order]
    permute = _source(parts)
    if permute is None:
        return "rows, counts and order do not come from one moe.permute"
    if any(len(part.users) > 1 for part in [*parts, experts]) or len(permute.users) > len(parts):
        return "the sorted rows are read elsewhere"
    mark = tag(unpermute)
    assert mark is not None, f"{unpermute.name} has no tag"
    emit = Emitter(program, unpermute, mark.block, mark.call, unpermute)
    x_TD, experts_TK, _ = permute.args
    weights = [given[name] for name in _WEIGHTS]
    fused = emit.call(
        "dispatch", _moe.dispatch_ffn.default, x_TD, experts_TK, weights_TK, *weights, given["activation"]
    )
    replace(unpermute, fused, mark.role)
    for node in (experts, *parts, permute):
        program.graph.erase_node(node)
    return None


def _source(parts: list[fx.Node]) -> fx.Node | None:
    """The moe.permute whose three results the parts are, in order."""
    for index, part in enumerate(parts):
        if part.target != operator.getitem or part.args[1] != index or part.args[0] != parts[0].args[0]:
            return None
    permute = parts[0].args[0]
    return permute if isinstance(permute, fx.Node) and permute.target == _moe.permute.default else None


def _why_in_steps(program: Program, unpermute: fx.Node, experts: fx.Node) -> str:
    mark = tag(unpermute)
    block = program.block(mark.block) if mark is not None else None
    if block is not None and block.region is not None:
        return "its activation has no name"
    if block is not None and block.hidden_dropout:
        return "it drops out its hidden value"
    return f"{experts.target} stands between"


def _where(program: Program, node: fx.Node) -> str:
    mark = tag(node)
    return node.name if mark is None else f"{program.block(mark.block).path}, call {mark.call},"
