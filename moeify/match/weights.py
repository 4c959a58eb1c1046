"""The weights of a block by role, and fused layers taken apart."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from moeify.ir.block import WeightRef
from moeify.match.probe import Probe, halves
from moeify.match.region import Region


def weights_of(region: Region, found: Probe) -> dict[str, WeightRef]:
    """The block's weights by role, absent ones left out."""
    down, ups = region.down, region.ups
    refs: dict[str, WeightRef | None] = {"down": down.weight, "down_bias": down.bias}
    if found.layout is not None:
        gate, up = halves(found.layout, down.d_in)
        refs |= {"up": _part(ups[0].weight, up), "gate": _part(ups[0].weight, gate)}
        refs |= {"up_bias": _part(ups[0].bias, up), "gate_bias": _part(ups[0].bias, gate)}
    elif found.gated:
        gate_layer, up_layer = ups[found.gate], ups[1 - found.gate]
        refs |= {"up": up_layer.weight, "gate": gate_layer.weight}
        refs |= {"up_bias": up_layer.bias, "gate_bias": gate_layer.bias}
    else:
        refs |= {"up": ups[0].weight, "up_bias": ups[0].bias}
    return {role: ref for role, ref in refs.items() if ref is not None}


def _part(ref: WeightRef | None, part: tuple[int, int, int]) -> WeightRef | None:
    """Some rows of a fused weight."""
    if ref is None:
        return None
    start, stop, step = part
    rows = len(range(start, stop, step))
    return replace(ref, shape=(rows, *ref.shape[1:]), steps=(*ref.steps, ("slice", 0, start, stop, step)))


def split_fused(module: fx.GraphModule, layout: str) -> None:
    """Give a row function of one fused value two inputs, up and gate."""
    aten = torch.ops.aten
    graph = module.graph
    (fused,) = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(fused):
        gate = graph.placeholder("g")
    with graph.inserting_after(gate):
        if layout.startswith("interleaved"):
            pairs = graph.call_function(aten.stack.default, ([gate, fused], -1))
        else:
            pairs = graph.call_function(aten.cat.default, ([gate, fused], 1))
    joined = pairs
    if layout.startswith("interleaved"):
        with graph.inserting_after(pairs):
            joined = graph.call_function(aten.flatten.using_ints, (pairs, 1))
    fused.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not pairs)
    graph.lint()
    module.recompile()
