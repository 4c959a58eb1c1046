"""Every key that moeify keeps in ``node.meta``, and who writes it.

| key | value | written by |
|---|---|---|
| ``val`` | fake tensor of the node's result | torch.export, ``ir.program`` for new nodes |
| ``nn_module_stack``, ``stack_trace`` | module path and user's line | torch.export |
| ``moeify`` | a ``Tag`` | find-ffn (the output of each call), make-experts and route (every node they add) |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

KEY = "moeify"


@dataclass(frozen=True)
class Tag:
    """Which block and call a node belongs to. Exactly one node per call has ``role == "output"``."""

    block: str  # Block.anchor
    call: int
    role: str  # "output", "router", "dispatch", "experts", "shared", "ffn"


def tag(node: fx.Node) -> Tag | None:
    return node.meta.get(KEY)


def outputs(graph: fx.Graph) -> dict[tuple[str, int], fx.Node]:
    """The output node of every call of every block, by (anchor, call)."""
    found = {}
    for node in graph.nodes:
        mark = tag(node)
        if mark is not None and mark.role == "output":
            found[mark.block, mark.call] = node
    return found
