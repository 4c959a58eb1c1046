"""A program as networkx graphs: every node, and the layers folded."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
from torch import fx

from moeify.ir.layers import is_compute, is_size
from moeify.ir.metadata import tag
from moeify.ir.printer import Printer, op_name
from moeify.ir.program import Program
from moeify.ir.views.folding import Fold, fold, program_layers


def node_graph(program: Program) -> nx.DiGraph:
    """Inputs, compute nodes and the output; edges are tensors.

    Attributes of a node, all strings: ``op``, ``shape`` (with the dtype), ``layer`` (module path),
    ``block`` (anchor), ``role``, ``parameters`` (names, comma-separated), ``line`` (its text). Of an edge:
    ``argument``, the position among the tensors its reader reads.
    """
    printer = Printer(program.graph_module, program.inputs)
    layer_of = {node: layer.path for layer in program_layers(program) for node in layer.nodes}
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        if not _shown(node):
            continue
        mark = tag(node)
        graph.add_node(
            node.name,
            op=op_name(node),
            shape=printer.type(node.meta.get("val")) if node.op != "output" else "",
            layer=layer_of.get(node, ""),
            block=mark.block if mark else "",
            role=mark.role if mark else "",
            parameters=", ".join(str(n.target) for n in node.all_input_nodes if n.op == "get_attr"),
            line=printer.line(node, layer_of.get(node, "")),
        )
        for position, source in enumerate(_sources(node)):
            graph.add_edge(source.name, node.name, argument=position)
    return graph


def folded_graph(program: Program) -> nx.DiGraph:
    """The node graph, every fold drawn once; nodes have ``fold``, the label of their layers, and ``count``.

    Where one layer of a fold feeds the next, the edge joins nodes of the one drawn and has ``again`` true.
    """
    full = node_graph(program)
    folds = fold(program)
    shown = dict(_representatives(folds))
    graph = nx.DiGraph()
    for part in folds:
        for node in part.layers[0].nodes:
            graph.add_node(node.name, **full.nodes[node.name], fold=part.label, count=part.count)
    for name, attributes in full.nodes(data=True):
        if name not in shown:  # inputs and the output
            graph.add_node(name, **attributes, fold="", count=1)
    for source, reader in full.edges:
        start, end = shown.get(source, (source, -1)), shown.get(reader, (reader, -1))
        again = graph.nodes[start[0]]["fold"] == graph.nodes[end[0]]["fold"] and start[1] != end[1]
        if not graph.has_edge(start[0], end[0]) or not again:
            graph.add_edge(start[0], end[0], again=again)
    return graph


def _representatives(folds: list[Fold]) -> Iterator[tuple[str, tuple[str, int]]]:
    """Name of a node -> the node drawn in its place, and which member of the fold it stands in."""
    for part in folds:
        for member, layer in enumerate(part.layers):
            for drawn, node in zip(part.layers[0].nodes, layer.nodes):
                yield node.name, (drawn.name, member)


def _shown(node: fx.Node) -> bool:
    return is_compute(node) or node.op in ("placeholder", "output")


def _sources(node: fx.Node) -> list[fx.Node]:
    """The tensors a node reads; of a size it reads nothing is drawn."""
    return [source for source in node.all_input_nodes if _shown(source) and not is_size(source)]
