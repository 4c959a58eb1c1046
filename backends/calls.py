"""Which nodes of an exported graph are the calls of converted blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir.no_expert import may_lack_experts

_moe = torch.ops.moeify
_UP = ".experts.up"
_FUSED = (_moe.dispatch_ffn.default,)


@dataclass(frozen=True)
class Call:
    """One call of a converted block, by names of nodes: its rows, the experts chosen, their weights, the result.

    ``rows`` is [T, D], ``experts`` int64 [T, K], ``weights`` [T, K], ``output`` [T, D]: the routed experts alone,
    without shared ones. ``nodes`` are the ``moe.*`` nodes of the call in graph order. ``lacking`` says that some slots
    may have no expert, see ``ir.no_expert``.
    """

    block: str  # Block.anchor
    number: int
    rows: str
    experts: str
    weights: str
    output: str
    nodes: tuple[str, ...]
    lacking: bool = False

    @property
    def name(self) -> str:
        return self.block if not self.number else f"{self.block}#{self.number}"


def find_calls(graph: fx.Graph) -> list[Call]:
    """The calls in graph order: a fused ``dispatch_ffn``, or ``permute`` to ``unpermute``."""
    seen: Counter[str] = Counter()
    calls: list[Call] = []
    for node in graph.nodes:
        if node.target in _FUSED:
            rows, experts, weights = node.args[:3]
            nodes, output = [node], node
        elif node.target == _moe.unpermute.default:
            order, weights = node.args[1], node.args[2]
            permute = order.args[0]
            rows, experts = permute.args[:2]
            nodes, output = [permute, *_between(permute, node), node], node
        else:
            continue
        block = _block(nodes)
        inside = tuple(n.name for n in nodes)
        names = (rows.name, experts.name, weights.name, output.name)
        calls.append(Call(block, seen[block], *names, inside, may_lack_experts(experts)))
        seen[block] += 1
    return calls


def _between(permute: fx.Node, unpermute: fx.Node) -> list[fx.Node]:
    """The ``moe.*`` nodes after a permute and before its unpermute."""
    downstream, found = {permute}, []
    node = permute.next
    while node is not unpermute:
        if any(source in downstream for source in node.all_input_nodes):
            downstream.add(node)
            if node.target in (_moe.grouped_linear.default, _moe.experts.default):
                found.append(node)
        node = node.next
    return found


def _block(nodes: list[fx.Node]) -> str:
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target).endswith(_UP):
                return str(source.target).removesuffix(_UP)
    raise AssertionError(f"{nodes[0].name} reads no experts")


@dataclass(frozen=True)
class Seen:
    """What a runtime computed in one call: its rows [T, D], the experts chosen [T, K], the result [T, D]."""

    rows: torch.Tensor
    experts: torch.Tensor
    output: torch.Tensor
