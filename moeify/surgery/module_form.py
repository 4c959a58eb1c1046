"""The module form of a program: the user's own model with its blocks replaced."""

from __future__ import annotations

import copy
import functools

import torch
from torch import fx, nn

from moeify.errors import Refused
from moeify.experts.planning import plan_block
from moeify.ir.block import Block
from moeify.ir.program import Program
from moeify.ir.token_ids import embedded_ids, ids_of_rows
from moeify.nn.routers import ROUTERS
from moeify.surgery.conversion import Conversion
from moeify.surgery.pretrained import guard
from moeify.surgery.region import has_tensor, tensor_at
from moeify.surgery.replace import rewrite


def apply(model: nn.Module, program: Program, *, in_place: bool = True) -> nn.Module:
    """Replace the converted blocks of ``program`` in the model it was captured from; gives the model.

    The new parameters have the names and values they have in graph form, and the dtype, device, ``requires_grad`` and
    ``training`` of what they replace. Values that the program has computed are taken over, memory and all; the others
    are computed block by block. Dense weights are let go as they are replaced, so the peak is dense + MoE once.
    ``in_place=False`` copies the model first.

    Raises Refused, before anything is changed, for a block whose code no submodule can replace; NotDivisible, BadRecipe
    and the like as the method does.
    """
    conversion = Conversion(
        recipe=program.recipe,
        blocks=program.converted(),
        token_ids_of=_token_ids_of(model, program),
        provenance=dict(program.provenance),
    )
    if not in_place:
        model = copy.deepcopy(model)
    rewrite(model, conversion, functools.partial(_computed, program), functools.partial(plan_block, program))
    guard(model)
    return model


def _computed(program: Program, name: str) -> torch.Tensor | None:
    return program.parameter(name) if name not in program.pending and has_tensor(program.graph_module, name) else None


def _token_ids_of(model: nn.Module, program: Program) -> dict[str, str]:
    """By anchor, for blocks whose router reads token ids: the path of the embedding that reads them too."""
    needing = [
        block
        for block in program.converted()
        if ROUTERS.parse(program.recipe.for_block(block.path).router).needs_token_ids
    ]
    if not needing:
        return {}
    nodes = {node.name: node for node in program.graph.nodes}
    return {block.anchor: _embedding(model, program.graph, block, nodes) for block in needing}


def _embedding(model: nn.Module, graph: fx.Graph, block: Block, nodes: dict[str, fx.Node]) -> str:
    """The same choice as route makes in graph form."""
    x = nodes.get(block.calls[0].input)
    found = ids_of_rows(embedded_ids(graph), x) if x is not None else None
    if found is None:
        raise Refused(
            "the router needs token ids, and no embedding reads a tensor of the shape of this block's rows",
            where=block.path,
            hint="choose another router for this block",
        )
    for reader in found.node.users:
        if reader.target == torch.ops.aten.embedding.default and isinstance(reader.args[0], fx.Node):
            table = tensor_at(model, str(reader.args[0].target))
            for path, module in model.named_modules():  # a tied table may go by the name of the output head
                if isinstance(module, nn.Embedding) and module.weight is table:
                    return path
    raise Refused(
        "the router needs token ids, and no nn.Embedding of the model reads them",
        where=block.path,
        hint="use the graph form: moeify.convert(model, form='graph')",
    )
