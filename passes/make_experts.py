"""Dense blocks into experts, every one of them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.experts.base import ExpertPlan
from moeify.experts.planning import plan_block
from moeify.ir.block import Block
from moeify.ir.emit import Emitter, arguments, replace
from moeify.ir.expert_nodes import flatten_tokens, routed_experts, shared_experts, unflatten_tokens, uniform_routing
from moeify.ir.metadata import outputs
from moeify.ir.program import Program
from moeify.ir.weights import WeightRecipe
from moeify.pipeline.base import Log, Pass

_aten = torch.ops.aten


@dataclass(frozen=True)
class MakeExperts(Pass):
    """Turn every selected block into experts that are all on with equal weights: for exact methods, and for those
    that split, still the same function.

    Before:  y = moe.ffn(x, up, gate, down, ...)
    After:   x_TD = reshape(x, [T, D])
             y_TD = moe.dispatch_ffn(x_TD, all experts, 1 / E (a split: 1), up_EFD, gate_EFD, down_EDF, ...)
             y = reshape(y_TD + moe.ffn(x_TD, shared ...) * sigmoid(gate x_TD) + output_bias, ...)

    A block whose activation has no name, or that drops out its hidden value, becomes moe.permute,
    moe.grouped_linear, the captured nodes over sorted rows, moe.grouped_linear, moe.unpermute instead. The new
    parameters are recipes (``pending``), frozen where the block is; a block that is called several times gets one
    set.
    """

    name: ClassVar[str] = "make-experts"

    def apply(self, program: Program, log: Log) -> None:
        by_name = {node.name: node for node in program.graph.nodes}
        output = outputs(program.graph)
        made: dict[fx.Node, fx.Node] = {}  # dense output -> what stands in its place, perhaps a later block's input
        for block in program.converted():
            plan = plan_block(program, block)
            trained = program.parameter(block.up.parameter).requires_grad
            for recipe in _recipes(block, plan):
                program.add_recipe(recipe, trained)
            for call, site in enumerate(block.calls):
                dense = output[block.anchor, call]
                if dense.target == torch.ops.moeify.ffn.default:
                    made[dense] = _replace_ffn(program, block, plan, call, dense)
                else:
                    x = by_name[site.input]
                    nodes = [by_name[name] for name in site.nodes if name != dense.name]
                    made[dense] = _replace_nodes(program, block, plan, call, made.get(x, x), nodes, dense)
            log(_line(program, block, plan))
        program.graph_module.recompile()


def _recipes(block: Block, plan: ExpertPlan) -> list[WeightRecipe]:
    recipes = [*plan.weights.values(), *plan.shared.values()]
    if plan.shared_gate:
        shape = (1, block.d_model)
        # Read from a dense weight for its device only: the gate starts at zero, sigmoid(0) = 1/2.
        recipes.append(
            WeightRecipe(
                f"{block.anchor}.shared_gate.weight",
                shape,
                (block.up,),
                lambda up: up.new_zeros(shape),
                recipes[0].dtype,
            )
        )
    if plan.output_bias is not None:
        recipes.append(plan.output_bias)
    return recipes


def _replace_ffn(program: Program, block: Block, plan: ExpertPlan, call: int, dense: fx.Node) -> fx.Node:
    emit = Emitter(program, dense, block.anchor, call, dense)
    given = arguments(dense)
    x: fx.Node = given["x"]
    y_TD = _mixture(emit, block, plan, flatten_tokens(emit, x), train=given["train"])
    y = unflatten_tokens(emit, y_TD, x)
    replace(dense, y)
    return y


def _replace_nodes(
    program: Program, block: Block, plan: ExpertPlan, call: int, x: fx.Node, nodes: list[fx.Node], dense: fx.Node
) -> fx.Node:
    emit = Emitter(program, dense, block.anchor, call, dense)
    _read_sizes_off(x, nodes)
    last = x.meta["val"].dim() - 1
    if block.layout == "channels-first":
        x = emit.call("dispatch", _aten.permute.default, x, [0, *range(2, last + 1), 1])
    y = unflatten_tokens(emit, _mixture(emit, block, plan, flatten_tokens(emit, x), train=False), x)
    if block.layout == "channels-first":
        y = emit.call("dispatch", _aten.permute.default, y, [0, last, *range(1, last)])
    replace(dense, y)
    for node in reversed(nodes):
        if not node.users:
            program.graph.erase_node(node)
    return y


def _read_sizes_off(x: fx.Node, nodes: list[fx.Node]) -> None:
    """Let whoever reads a size off the dense block's inner nodes read it off ``x``, so that they can go."""
    inside = set(nodes)
    sizes = {str(size): dim for dim, size in enumerate(x.meta["val"].shape) if not isinstance(size, int)}
    for node in nodes:
        for user in list(node.users):
            if user.target == _aten.sym_size.int and user not in inside:
                dim = sizes.get(str(user.meta["val"]))
                if dim is not None:
                    user.args = (x, dim)


def _mixture(emit: Emitter, block: Block, plan: ExpertPlan, x_TD: fx.Node, *, train: Any) -> fx.Node:
    experts_TK, weights_TK = uniform_routing(emit, x_TD, plan.num_experts, plan.gate)
    weights = {role: recipe.name for role, recipe in plan.weights.items()}
    y_TD = routed_experts(emit, block, weights, plan.num_experts, x_TD, experts_TK, weights_TK, train)
    if plan.shared:
        shared = {role: recipe.name for role, recipe in plan.shared.items()}
        gate = f"{block.anchor}.shared_gate.weight" if plan.shared_gate else None
        y_TD = emit.call("shared", _aten.add.Tensor, y_TD, shared_experts(emit, block, shared, gate, x_TD, train))
    if plan.output_bias is not None:
        bias = emit.parameter("experts", plan.output_bias.name)
        y_TD = emit.call("experts", _aten.add.Tensor, y_TD, bias)
    return y_TD


def _line(program: Program, block: Block, plan: ExpertPlan) -> str:
    recipe = program.recipe.for_block(block.path)
    shared = f" and {recipe.shared} shared" if plan.shared else ""
    calls = f", {len(block.calls)} calls" if len(block.calls) > 1 else ""
    return f"{block.path}: {plan.num_experts} experts of width {plan.d_expert}{shared} by {recipe.method}{calls}"
