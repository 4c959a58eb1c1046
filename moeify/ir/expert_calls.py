"""The calls of a program's mixtures as they stand in its graph, also in a graph that was loaded from a file."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from moeify.ir.metadata import KEY, Tag, tag
from moeify.ir.program import Program

_moe = torch.ops.moeify
_EXPERTS = ".experts."
_STACKED = {  # operator -> the positions of its stacked weights
    _moe.experts.default: range(2, 8),
    _moe.grouped_linear.default: range(2, 4),
}


@dataclass(frozen=True)
class ExpertCall:
    """One call of a mixture, opened into its stages.

    ``rows``, ``counts`` and ``order`` are the results of ``permute``; ``inside`` the nodes that compute the experts'
    rows from them, in graph order, ``unpermute`` excluded.
    """

    block: str  # Block.anchor
    permute: fx.Node
    rows: fx.Node
    counts: fx.Node
    order: fx.Node
    inside: tuple[fx.Node, ...]
    unpermute: fx.Node

    @property
    def num_experts(self) -> int:
        return int(self.permute.args[2])  # type: ignore[arg-type]

    @property
    def top_k(self) -> int:
        return int(self.permute.args[1].meta["val"].shape[1])  # type: ignore[union-attr]

    @property
    def width(self) -> int:
        return int(self.rows.meta["val"].shape[1])

    @property
    def weights(self) -> tuple[fx.Node, ...]:
        """The reads of stacked weights, in order, each once."""
        found: dict[fx.Node, None] = {}
        for node in self.inside:
            for position in _STACKED.get(node.target, ()):  # type: ignore[call-overload]
                weight = node.args[position] if position < len(node.args) else None
                if isinstance(weight, fx.Node):
                    found[weight] = None
        return tuple(found)


def tag_untagged(program: Program) -> None:
    """Give the ``moe.*`` nodes of a loaded graph, whose tags are not in the file, the block and call they are of.

    Only nodes between tokens and tokens are tagged (``dispatch_ffn``, ``permute``, ``unpermute``); the block is where
    their stacked weights live.
    """
    seen: Counter[str] = Counter()
    for node in program.graph.nodes:
        if tag(node) is not None or node.target not in (_moe.dispatch_ffn.default, _moe.unpermute.default):
            continue
        nodes = [node]
        if node.target == _moe.unpermute.default:
            call = open_call(node)
            nodes = [node, call.permute, *call.inside]
        block = _anchor(nodes)
        for one in nodes:
            one.meta[KEY] = Tag(block, seen[block], "dispatch")
        seen[block] += 1


def expert_calls(graph: fx.Graph) -> list[ExpertCall]:
    """The opened calls in graph order; each ``moe.unpermute`` ends one."""
    return [open_call(node) for node in graph.nodes if node.target == _moe.unpermute.default]


def open_call(unpermute: fx.Node) -> ExpertCall:
    """The call that the node ends."""
    out, order = unpermute.args[:2]
    assert isinstance(out, fx.Node)
    assert isinstance(order, fx.Node)
    permute = order.args[0]
    assert isinstance(permute, fx.Node)
    results = {user.args[1]: user for user in permute.users if user.target is operator.getitem}
    rows, counts = results[0], results[1]
    inside = _between({rows, counts}, out)
    mark = tag(unpermute)
    block = mark.block if mark is not None else _anchor([unpermute, *inside])
    return ExpertCall(block, permute, rows, counts, order, inside, unpermute)


def _between(sources: set[fx.Node], end: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes on the ways from the sources to ``end``, ``end`` included."""
    needed, left = {end}, [end]
    while left:
        for node in left.pop().all_input_nodes:
            if node not in needed and node not in sources:
                needed.add(node)
                left.append(node)
    reached, found = set(sources), []
    node = min(sources).next  # fx nodes compare by their place in the graph
    while node is not end.next:
        if node in needed and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            found.append(node)
        node = node.next
    return tuple(found)


def _anchor(nodes: list[fx.Node]) -> str:
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and _EXPERTS in str(source.target):
                return str(source.target).rpartition(_EXPERTS)[0]
    raise AssertionError(f"{nodes[0].name} reads no experts")
