"""A Program to ONNX for one target: neutral nodes first, then each replaced by the lowering that was chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common
from torch import fx

from moeify.backends.calls import Call, find_calls
from moeify.backends.deploy import Choice
from moeify.backends.exporting import drop_router_noise, export
from moeify.backends.onnxruntime import mixture as mixtures
from moeify.backends.onnxruntime import split
from moeify.backends.onnxruntime.emit import Emitter
from moeify.backends.onnxruntime.mixture import Mixture
from moeify.backends.onnxruntime.narrow_topk import narrow_topk
from moeify.backends.onnxruntime.neutral import DOMAIN, to_onnx
from moeify.ir.program import Program

# What a block is made of when its activation has no name; there is one way to lower these.
_STANDARD: Mapping[str, Callable[[Emitter, ir.Node, bool], None]] = {
    "Permute": split.lower_permute,
    "Unpermute": split.lower_unpermute,
    "GroupedLinear": split.lower_grouped_linear,
    "Experts": split.lower_experts,
}


@dataclass(frozen=True)
class Taps:
    """The names of the ONNX values that verification looks at: rows [T, D], experts [T, K], output [T, D]."""

    rows: str
    experts: str
    output: str


Lowering = Callable[[Emitter, Mixture], None]
Choose = Callable[[Mixture], Choice]


@dataclass
class Neutral:
    """A Program in ONNX before any choice, and the torch graph it came from: names of nodes are names of values."""

    model: ir.Model
    module: fx.GraphModule
    calls: list[Call]


@dataclass
class Lowered:
    """An ONNX model without neutral nodes. ``choices`` and ``taps`` are in the order of ``calls``."""

    model: ir.Model
    module: fx.GraphModule
    calls: list[Call]
    choices: list[Choice]
    taps: list[Taps]


def neutral(program: Program) -> Neutral:
    """Raises NotExportable."""
    still = program.clone()
    drop_router_noise(still)
    exported = export(still)
    module = exported.module(check_guards=False)
    model = to_onnx(exported, program.inputs)
    narrow_topk(model)
    return Neutral(model, module, find_calls(module.graph))


def lower(source: Neutral, choose: Choose, table: Mapping[str, Lowering]) -> Lowered:
    """Replace the neutral nodes, each as ``choose`` says by a lowering of ``table``.

    In a copy that shares the weights: ``source`` can be lowered again.
    """
    model = source.model.clone()
    made = {value.name: node for node in model.graph for value in node.outputs}
    choices, taps, owners = [], [], dict[ir.Node, Call]()
    for call in source.calls:
        node = made[call.output]
        first = node if node.op_type == "DispatchFFN" else _permute(node)
        assert first.inputs[0] is not None
        assert first.inputs[1] is not None
        taps.append(Taps(str(first.inputs[0].name), str(first.inputs[1].name), call.output))
        if node.op_type == "DispatchFFN":
            mixture = mixtures.read(node, call)
            choice = choose(mixture)
            table[choice.lowering](Emitter(model, node, call.name), mixture)
        else:
            choice = Choice("split", "the activation has no name: its own nodes stand between the products")
            members = {first, *(use.node for value in first.outputs for use in value.uses())}
            owners.update(dict.fromkeys(members, call))
        choices.append(choice)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            owner = owners[node]
            _STANDARD[node.op_type](Emitter(model, node, owner.name), node, owner.lacking)
    model.opset_imports.pop(DOMAIN, None)
    common.RemoveUnusedNodesPass()(model)
    return Lowered(model, source.module, source.calls, choices, taps)


def _permute(unpermute: ir.Node) -> ir.Node:
    """Where the order comes from. torch.onnx numbers a permute and its three values anew: their names are of no use."""
    order = unpermute.inputs[1]
    assert order is not None
    permute = order.producer()
    assert permute is not None
    return permute
