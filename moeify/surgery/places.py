"""Where in the user's model a block stands, and whether submodules can take its place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moeify.errors import Refused
from moeify.ir.block import Block
from moeify.surgery.slot import features


@dataclass(frozen=True)
class OwnedPlace:
    """A submodule that holds the block and nothing else."""

    owner: nn.Module


@dataclass(frozen=True)
class CarrierPlace:
    """The layers of a block inside code that does more. ``first`` is called ``up`` or ``gate`` by its block, whichever
    comes first in the model's code; ``second`` is None without a gate and when one layer computes both.
    """

    first: nn.Module
    second: nn.Module | None
    down: nn.Module
    channels: int  # the axis of the features, counted from the end


Place = OwnedPlace | CarrierPlace


def find(model: nn.Module, block: Block) -> Place:
    """Raises Refused when the model's code uses the block's weights without a submodule to replace."""
    if block.owner:
        return OwnedPlace(model.get_submodule(block.owner))
    layers = [model.get_submodule(path) for path in block.linears]
    # Fused gate and up are one layer; a layer without a module is missing from `linears`.
    wanted = {ref.parameter for role, ref in block.weights.items() if role in ("up", "gate", "down")}
    if len(layers) != len(wanted) or len(layers) < 2 or not all(_is_linear(layer) for layer in layers):
        raise Refused(
            "the model's own code reads the weights of this block: there is no submodule to replace",
            where=block.path or block.anchor,
            hint="use the graph form: moeify.convert(model, form='graph')",
        )
    first, *middle, down = layers
    weight = first.weight
    assert isinstance(weight, nn.Parameter)
    return CarrierPlace(first, middle[0] if middle else None, down, -max(1, weight.ndim - 1))


def paths_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (parent, name) under which a module is registered: a shared one has several."""
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it is registered."""
    for parent, name in paths_of(model, old):
        parent._modules[name] = new


def _is_linear(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
        return False
    ins, outs = features(layer)
    return ins > 0 and outs > 0
