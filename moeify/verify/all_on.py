"""The experts of a split, all on: together they are the dense block, or the partition lost something."""

from __future__ import annotations

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.experts.planning import plan_block
from moeify.ir.emit import Emitter
from moeify.ir.expert_nodes import uniform_routing
from moeify.ir.metadata import tag
from moeify.ir.program import Program
from moeify.verify.measure import Recording

_moe = torch.ops.moeify


def all_on_errors(program: Program, dense: Recording) -> dict[str, float]:
    """The relative error of every split block by anchor, each token going through all its experts with weight 1.

    ``program`` is a rewritten one whose weights are computed; it stays as it is. ``dense`` recorded it before. Empty
    where no method splits.
    """
    split = {block.anchor for block in program.converted() if plan_block(program, block).gate is not None}
    if not split:
        return {}
    errors = dense.block_errors(all_on(program))
    return {anchor: error for anchor, error in errors.items() if anchor in split}


def all_on(program: Program) -> Program:
    """A program that shares ``program``'s weights, its split blocks with every expert on.

    Before:  y_TD = moe.dispatch_ffn(x_TD, experts_TK, weights_TK, up_EFD, ...)
    After:   y_TD = moe.dispatch_ffn(x_TD, all experts, 1, up_EFD, ...)
    """
    twin = program.clone()
    plans = {block.anchor: plan_block(program, block) for block in program.converted()}
    weights: dict[tuple[str, int], fx.Node] = {}
    for node in list(twin.graph.nodes):
        mark = tag(node)
        if mark is None or mark.block not in plans or plans[mark.block].gate is None:
            continue
        plan, call = plans[mark.block], (mark.block, mark.call)
        if node.target in (_moe.dispatch_ffn.default, _moe.permute.default):
            emit = Emitter(twin, node, mark.block, mark.call, node)
            experts_TE, weights[call] = uniform_routing(emit, node.args[0], plan.num_experts, plan.gate)
            node.update_arg(1, experts_TE)
        if node.target in (_moe.dispatch_ffn.default, _moe.unpermute.default):
            node.update_arg(2, weights[call])
    twin.graph_module.recompile()
    return twin
