"""Layers that compute the same, folded into one.

Two layers are the same when their canonical text is the same: nodes numbered within the layer, what comes
from outside numbered by first use, parameters by relative name, shape and dtype. Unlike a Weisfeiler-Lehman
hash this never merges two layers that differ, and it costs one pass over the nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from moeify.ir.layers import Layer, is_compute, layers
from moeify.ir.printer import Printer, op_name
from moeify.ir.program import Program
from moeify.ir.views.labels import group_paths, label


@dataclass(frozen=True)
class Fold:
    """Layers that compute the same; ``lines`` is the text of the first."""

    layers: tuple[Layer, ...]
    lines: tuple[str, ...]

    @property
    def label(self) -> str:
        """``encoder.layer.0-5``; '(model)' for nodes of the root."""
        return label([layer.path for layer in self.layers]) or "(model)"

    @property
    def count(self) -> int:
        return len(self.layers)


def fold(program: Program) -> list[Fold]:
    """The program's layers, same ones folded, in order of first appearance."""
    printer = Printer(program.graph_module, program.inputs)
    alike: dict[tuple[str, ...], list[Layer]] = {}
    for layer in program_layers(program):
        alike.setdefault(local_lines(printer, layer, canonical=True), []).append(layer)
    groups = [
        [members[i] for i in group]
        for members in alike.values()
        for group in group_paths([layer.path for layer in members])
    ]
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    groups.sort(key=lambda group: position[group[0].nodes[0]])
    return [Fold(tuple(group), tuple(printer.line(node, group[0].path) for node in group[0].nodes)) for group in groups]


def program_layers(program: Program) -> list[Layer]:
    """The program's layers, none of them cut inside a block."""
    return layers(program.graph, [block.path for block in program.blocks])


def local_lines(printer: Printer, layer: Layer, *, canonical: bool = False) -> tuple[str, ...]:
    """A layer's text with its own names: nodes by operator and count, outside ones in0, in1, ..."""
    local = printer.renamed(_local_names(layer), canonical=canonical)
    return tuple(local.line(node, layer.path) for node in layer.nodes)


def _local_names(layer: Layer) -> Callable[[fx.Node], str]:
    names: dict[fx.Node, str] = {}
    used: Counter[str] = Counter()
    for node in layer.nodes:
        base = op_name(node).split(".")[1] if "." in op_name(node) else op_name(node)
        names[node] = f"{base}_{used[base]}" if used[base] else base
        used[base] += 1
    outside = 0
    for node in layer.nodes:
        for source in node.all_input_nodes:
            if source not in names and (is_compute(source) or source.op == "placeholder"):
                names[source] = f"in{outside}"
                outside += 1
    return names.__getitem__
