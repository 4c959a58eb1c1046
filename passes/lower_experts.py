"""The fused dispatch into its three steps, so that other passes can put something between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir.emit import Emitter, arguments, replace
from moeify.ir.metadata import tag
from moeify.ir.program import Program
from moeify.pipeline.base import Log, Pass

_moe = torch.ops.moeify
_WEIGHTS = ("up_EFD", "gate_EFD", "down_EDF", "up_bias_EF", "gate_bias_EF", "down_bias_ED")


@dataclass(frozen=True)
class LowerExperts(Pass):
    """Take every dispatch apart.

    Before:  y_TD = moe.dispatch_ffn(x_TD, experts_TK, weights_TK, up_EFD, ...)
    After:   rows, counts, order = moe.permute(x_TD, experts_TK, E)
             y_TD = moe.unpermute(moe.experts(rows, counts, up_EFD, ...), order, weights_TK)
    """

    name: ClassVar[str] = "lower-experts"

    def apply(self, program: Program, log: Log) -> None:
        count = 0
        for node in list(program.graph.nodes):
            if node.target != _moe.dispatch_ffn.default:
                continue
            mark = tag(node)
            assert mark is not None, f"{node.name} has no tag"
            given = arguments(node)
            num_experts = given["up_EFD"].meta["val"].shape[0]
            emit = Emitter(program, node, mark.block, mark.call, node)
            permuted = emit.call("dispatch", _moe.permute.default, given["x_TD"], given["experts_TK"], num_experts)
            rows, counts, order = (emit.getitem("dispatch", permuted, i) for i in range(3))
            weights = [given[name] for name in _WEIGHTS]
            out = emit.call("experts", _moe.experts.default, rows, counts, *weights, given["activation"])
            y_TD = emit.call("dispatch", _moe.unpermute.default, out, order, given["weights_TK"])
            replace(node, y_TD, "output" if mark.role == "output" else "dispatch")
            count += 1
        program.graph_module.recompile()
        log(f"{count} dispatches taken apart")
