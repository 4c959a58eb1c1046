"""Slots without an expert: the number E among the experts of a token, and who may meet it.

``moe.permute`` and ``moe.dispatch_ffn`` sort such slots last and compute nothing for them. What cannot skip them calls
``fill_slots``: the last expert computes a row that is then multiplied by the slot's weight, 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir.emit import Emitter
from moeify.ir.metadata import tag
from moeify.ir.program import Program

_aten = torch.ops.aten
_moe = torch.ops.moeify
_READERS = (_moe.dispatch_ffn.default, _moe.permute.default)
_MARK = _aten.masked_fill.Scalar


def without_expert(experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The experts and weights of a router that gives a token fewer than K: number E and weight 0 where not ``kept``."""
    left_TK = torch.logical_not(kept_TK)
    return experts_TK.masked_fill(left_TK, num_experts), weights_TK.masked_fill(left_TK, 0.0)


def may_lack_experts(experts_TK: fx.Node) -> bool:
    """Whether a slot may hold the number E: whether ``without_expert`` made the experts, as the graph tells."""
    left, seen = [experts_TK], {experts_TK}
    while left:
        node = left.pop()
        if node.target == _MARK:
            return True
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if source not in seen and isinstance(value, Tensor) and value.dtype == torch.int64:
                seen.add(source)
                left.append(source)
    return False


def fill_slots(program: Program) -> int:
    """Put the last expert, in place, into every slot without one; gives the number of calls where it did.

    Before:  y_TD = moe.dispatch_ffn(x_TD, experts_TK, weights_TK, ...)
    After:   y_TD = moe.dispatch_ffn(x_TD, clamp(experts_TK, None, E - 1), weights_TK, ...)
    """
    filled = 0
    for node in [node for node in program.graph.nodes if node.target in _READERS]:
        experts_TK = node.args[1]
        assert isinstance(experts_TK, fx.Node)
        if not may_lack_experts(experts_TK):
            continue
        mark = tag(node)
        emit = Emitter(program, node, mark.block if mark else "", mark.call if mark else 0, experts_TK)
        last = _num_experts(node) - 1
        node.update_arg(1, emit.call("router", _aten.clamp.default, experts_TK, None, last))
        filled += 1
    program.graph_module.recompile()
    return filled


def _num_experts(node: fx.Node) -> int:
    if node.target == _moe.permute.default:
        return int(node.args[2])  # type: ignore[arg-type]
    up_EFD = node.args[3]
    assert isinstance(up_EFD, fx.Node)
    return int(up_EFD.meta["val"].shape[0])
