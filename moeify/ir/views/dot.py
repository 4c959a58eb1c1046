"""The folded graph in Graphviz' DOT language, and the full one as GraphML."""

from __future__ import annotations

import networkx as nx

from moeify.ir.program import Program
from moeify.ir.views.graph import folded_graph, node_graph

_MOE = ', style=filled, fillcolor="#dce9f9"'


def dot(program: Program) -> str:
    """One cluster per distinct layer; an edge that leads into the next of the folded layers is dashed."""
    graph = folded_graph(program)
    lines = [
        "digraph program {",
        "  node [shape=box, fontname=monospace, fontsize=10];",
        "  edge [fontsize=9];",
    ]
    clusters: dict[tuple[str, int], list[str]] = {}
    for name, attributes in graph.nodes(data=True):
        clusters.setdefault((attributes["fold"], attributes["count"]), []).append(name)
    for number, ((label, count), names) in enumerate(clusters.items()):
        inside = [f"{_quote(name)} [label={_label(graph, name)}];" for name in names]
        if not label:
            lines += [f"  {line}" for line in inside]
            continue
        title = f"{label}  x{count}" if count > 1 else label
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quote(title)};"]
        lines += [f"    {line}" for line in inside] + ["  }"]
    for source, reader, again in graph.edges(data="again"):
        style = " [style=dashed, constraint=false]" if again else ""
        lines.append(f"  {_quote(source)} -> {_quote(reader)}{style};")
    return "\n".join([*lines, "}"]) + "\n"


def graphml(program: Program) -> str:
    """Every node with the attributes of ``node_graph``."""
    return "\n".join(nx.generate_graphml(node_graph(program))) + "\n"


def _label(graph: nx.DiGraph, name: str) -> str:
    attributes = graph.nodes[name]
    text = "\\n".join(_escape(part) for part in (attributes["op"], name, attributes["shape"]) if part)
    colour = _MOE if attributes["op"].startswith("moe.") else ""
    return f'"{text}"{colour}'


def _quote(text: str) -> str:
    return f'"{_escape(text)}"'


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
