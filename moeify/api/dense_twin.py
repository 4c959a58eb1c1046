"""The dense model that a converted program came from, as far as its cost goes: what ``moeify bench`` compares with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from moeify.backends.calls import Call, find_calls
from moeify.errors import Refused
from moeify.ir.activations import TABLE
from moeify.ir.program import Program
from moeify.ir.report import BlockReport

_aten = torch.ops.aten
_moe = torch.ops.moeify
_SCALE = 0.02  # of a usual initialisation: values stay in the normal range of floats through many layers
_ROLES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


def dense_twin(program: Program, blocks: Mapping[str, BlockReport]) -> Program:
    """The program with every mixture replaced by a dense FFN of the block's own hidden width, weights random.

    Routers and shared experts are gone with it, all other weights are the program's own. ``blocks`` are the
    conversion's reports by anchor. Raises Refused for a block whose activation has no name: what stands between its
    products is made for the width of one expert.
    """
    twin = program.clone()
    calls = find_calls(twin.graph)
    nodes = {node.name: node for node in twin.graph.nodes}
    for call in calls:
        block = blocks[call.block]
        if block.activation not in TABLE:
            raise Refused("the activation of this block has no name, so its dense form is not known", where=block.path)
        _replace(twin, nodes[call.rows], nodes[call.output], call, block)
    twin.graph.eliminate_dead_code()
    twin.graph_module.recompile()
    _drop_unread(twin)
    return twin


def _replace(twin: Program, rows: fx.Node, output: fx.Node, call: Call, block: BlockReport) -> None:
    names = {name for name, _ in twin.graph_module.named_parameters(remove_duplicate=False)}
    last = _without_shared(output, call.block) if block.shared else output
    with twin.graph.inserting_before(output):
        weights = [
            _random(twin, call, role, block.d_ff) if f"{call.block}.experts.{role}" in names else None
            for role in _ROLES
        ]
        dense = twin.graph.call_function(_moe.ffn.default, (rows, *weights, block.activation))
    dense.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(dense)


def _random(twin: Program, call: Call, role: str, d_ff: int) -> fx.Node:
    """A weight of the dense FFN, like the stacked one; calls of one block share it."""
    stacked = twin.parameter(f"{call.block}.experts.{role}")
    sizes: Mapping[str, tuple[int, ...]] = {
        "up": (d_ff, stacked.shape[-1]),
        "gate": (d_ff, stacked.shape[-1]),
        "down": (stacked.shape[1], d_ff),
        "up_bias": (d_ff,),
        "gate_bias": (d_ff,),
        "down_bias": (stacked.shape[1],),
    }
    name = f"{call.block}.dense.{role}"
    if call.number == 0:
        generator = torch.Generator().manual_seed(_ROLES.index(role))
        value = torch.randn(sizes[role], generator=generator) * _SCALE
        twin.set_parameter(name, value.to(stacked.dtype), requires_grad=False)
    return twin.graph.get_attr(name)


def _without_shared(node: fx.Node, anchor: str) -> fx.Node:
    """The sum of routed and shared experts: the first reader that adds what reads the block's shared weights."""
    for user in node.users:
        if user.target == _aten.add.Tensor:
            others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node]
            if any(_reads_shared(other, f"{anchor}.shared.") for other in others):
                return user
    raise AssertionError(f"{anchor} has shared experts that nothing adds")


def _reads_shared(node: fx.Node, prefix: str) -> bool:
    """Whether the FFN that ends in ``node``, a gate around it included, reads a weight of that prefix."""
    seen, todo = {node}, [node]
    for _ in range(12):  # a gated FFN behind a sigmoid gate is that deep, and the layers before it are not reached
        todo = [source for one in todo for source in one.all_input_nodes if source not in seen]
        if any(one.op == "get_attr" and str(one.target).startswith(prefix) for one in todo):
            return True
        seen.update(todo)
    return False


def _drop_unread(twin: Program) -> None:
    read = {str(node.target) for node in twin.graph.find_nodes(op="get_attr")}
    for name in [name for name, _ in twin.graph_module.named_parameters(remove_duplicate=False)]:
        if name not in read:
            twin.drop_parameter(name)
