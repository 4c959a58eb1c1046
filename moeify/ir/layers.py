"""Cutting a program's graph into layers, for people: which module a node belongs to and where one layer ends.

A layer is a run of consecutive nodes of one repeated module, such as ``encoder.layer.3``. Modules count as
repeated when two or more of them differ by one number only and each computes something of its own.
Everything else goes by its outermost module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from moeify.ir.metadata import tag
from moeify.ir.where import common_path, module_path

_NUMBERED = re.compile(r"(?:.*_)?\d+")  # a component such as "3" or "encoder_layer_3"


@dataclass(frozen=True)
class Layer:
    """Consecutive nodes of one call of one module; ``path`` is '' for nodes of the root."""

    path: str
    nodes: tuple[fx.Node, ...]


def is_size(node: fx.Node) -> bool:
    """Whether the node computes a size (an int), not a tensor."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), (int, torch.SymInt))


def is_compute(node: fx.Node) -> bool:
    """Whether the node computes a tensor: not a parameter, input, size or the output."""
    return node.op not in ("get_attr", "placeholder", "output") and not is_size(node)


def layers(graph: fx.Graph, blocks: Iterable[str] = ()) -> list[Layer]:
    """The compute nodes as layers, in order. No layer is cut inside one of ``blocks`` (module paths)."""
    nodes = [node for node in graph.nodes if is_compute(node)]
    own = {node: _own_path(node) for node in nodes}
    repeated = _repeated(own, [block for block in blocks if block])
    found: list[tuple[str, str, list[fx.Node]]] = []  # path, call marker, nodes
    for node in nodes:
        path = own[node]
        layer = _layer_of(path, repeated) if path is not None else None
        call = _call_marker(node, layer) if layer else ""
        if found and layer in (None, found[-1][0]) and call in (None, "", found[-1][1]):
            found[-1][2].append(node)
        else:
            found.append((layer or "", call or "", [node]))
    return [Layer(path, tuple(members)) for path, _, members in found]


def _own_path(node: fx.Node) -> str | None:
    """The module of a node: by its tag, its trace, or the parameters it reads; None when nothing tells."""
    mark = tag(node)
    if mark is not None:
        return mark.block
    if _stack(node):
        return module_path(node)
    reads = [str(source.target).rpartition(".")[0] for source in node.all_input_nodes if source.op == "get_attr"]
    return common_path(reads) or None


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, entry[0]) for key, entry in stack.items() if not entry[0].startswith("_empty_nn_module_stack")]


def _repeated(own: dict[fx.Node, str | None], blocks: list[str]) -> set[str]:
    """Paths ending in a number that compute two or more nodes a call, and have a sibling or second call."""
    count: dict[tuple[str, str], int] = defaultdict(int)  # (path, call) -> nodes
    for node, path in own.items():
        above = [(entry, key) for key, entry in _stack(node)] or [(prefix, "") for prefix in _prefixes(path or "")]
        for entry in above:
            if _NUMBERED.fullmatch(entry[0].rpartition(".")[2]):
                count[entry] += 1
    siblings: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for (path, call), nodes in count.items():
        if nodes >= 2 and not any(path.startswith(f"{block}.") for block in blocks):
            siblings[re.sub(r"\d+$", "*", path)].add((path, call))
    return {path for group in siblings.values() if len(group) >= 2 for path, _ in group}


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _layer_of(path: str, repeated: set[str]) -> str:
    """The deepest repeated module above the path, or its outermost module."""
    prefixes = _prefixes(path)
    return next((prefix for prefix in reversed(prefixes) if prefix in repeated), prefixes[0])


def _call_marker(node: fx.Node, layer: str) -> str | None:
    """Which call of a shared layer: torch.export marks the second with @1, the third with @2, ...

    None when the node has no trace, so that it stays with the node before it.
    """
    stack = _stack(node)
    if not stack:
        return None
    above = [key for key, path in stack if layer == path or layer.startswith(f"{path}.") or path == ""]
    return "".join(mark[0] for key in above if (mark := re.search(r"@\d+$", key)))
