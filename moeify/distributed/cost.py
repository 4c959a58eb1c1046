"""What an exchange between ranks and the experts' products take, in bytes and seconds: formulas, no state.

Letters: T tokens of one rank, D width of a row, K experts per token, E experts, s bytes of an element, W ranks that
share one set of experts, g of them in a node. ``payload`` is T * K * D * s: the rows of a rank for all ranks, itself
included; (W - 1) / W of it leaves the rank when experts are chosen evenly.

A message costs ``alpha`` seconds and a byte 1 / bandwidth (Hockney, Parallel Computing 20, 1994); compute is a roofline
(Williams, Waterman, Patterson, CACM 52, 2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

COUNT_BYTES = 8  # the counts exchange sends one int64 per expert


@dataclass(frozen=True)
class Link:
    """``alpha``: seconds of one message. ``bandwidth``: bytes/s that one rank sends."""

    alpha: float
    bandwidth: float


@dataclass(frozen=True)
class Group:
    """W ranks that share one set of experts, ``per_node`` of them (fewer if there are fewer) in each node."""

    ranks: int
    per_node: int

    @property
    def in_node(self) -> int:
        return min(self.per_node, self.ranks)

    @property
    def nodes(self) -> int:
        return self.ranks // self.in_node


def leaving(payload: float, ranks: int) -> float:
    """Bytes of a payload that leave the rank: ``payload * (W - 1) / W``."""
    return payload * (ranks - 1) / ranks


def flat_seconds(payload: float, group: Group, intra: Link, inter: Link) -> float:
    """One all-to-all over all ranks at once: the two kinds of links work at the same time.

    ``max((g - 1) a_intra + n_intra / B_intra, (W - g) a_inter + n_inter / B_inter)``
    """
    W, g = group.ranks, group.in_node
    within = (g - 1) * intra.alpha + payload * (g - 1) / W / intra.bandwidth
    across = (W - g) * inter.alpha + payload * (W - g) / W / inter.bandwidth
    return max(within, across)


def hierarchical_seconds(payload: float, group: Group, intra: Link, inter: Link, dedup: float = 1.0) -> float:
    """First between nodes, to the rank of the same number; then inside each node.

    ``(nodes - 1) a_inter + n_inter * dedup / B_inter + (g - 1) a_intra + n (g - 1) / g / B_intra``. With ``dedup``
    below 1 (see ``dedup_share``) a token crosses to each node once, however many of its experts are there.
    """
    W, g, nodes = group.ranks, group.in_node, group.nodes
    across = (nodes - 1) * inter.alpha + payload * (W - g) / W * dedup / inter.bandwidth
    within = (g - 1) * intra.alpha + payload * (g - 1) / g / intra.bandwidth
    return across + within


def distinct_nodes(experts_per_node: Sequence[int], top_k: int) -> float:
    """How many nodes hold an expert of a token, expected, when its K different experts are chosen evenly.

    ``sum over nodes of 1 - C(E - m, K) / C(E, K)`` for a node of m experts (hypergeometric).
    """
    E = sum(experts_per_node)
    return sum(1.0 - _none_of(m, E, top_k) for m in experts_per_node)


def dedup_share(experts_per_node: Sequence[int], top_k: int) -> float:
    """Copies of a token that cross, over K."""
    return distinct_nodes(experts_per_node, top_k) / top_k


def compute_seconds(flops: float, weight_bytes: float, peak: float, bandwidth: float) -> float:
    """The longer of computing (FLOP/s) and reading the weights (bytes/s)."""
    return max(flops / peak, weight_bytes / bandwidth)


def touched_experts(experts: float, top_k: int, num_experts: int, tokens: int) -> float:
    """How many of ``experts`` have a row, expected, when ``tokens`` tokens choose K of ``num_experts`` evenly."""
    return experts * (1.0 - (1.0 - top_k / num_experts) ** tokens)


def compute_bound_rows(item: int, peak: float, bandwidth: float) -> float:
    """Rows per expert from which a product is bound by arithmetic: ``s * peak / (2 * bandwidth)``.

    A weight is read once (s bytes) and used in 2 FLOPs per row.
    """
    return item * peak / (2.0 * bandwidth)


def bandwidth_bound_tokens(row_bytes: float, ranks: int, link: Link) -> float:
    """Tokens of a rank from which a flat exchange spends more on bytes than on messages.

    ``T * row_bytes / W / B >= alpha`` for the part that goes to one rank; ``row_bytes`` is K * D * s.
    """
    return link.alpha * link.bandwidth * ranks / row_bytes


def _none_of(m: int, E: int, top_k: int) -> float:
    """C(E - m, K) / C(E, K)."""
    return math.prod((E - m - i) / (E - i) for i in range(top_k)) if E - m >= top_k else 0.0
