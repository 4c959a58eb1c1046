"""Growing backwards from a down layer to the linear layers it hangs on."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from moeify.match.linear import Linear
from moeify.match.ops import (
    ATTENTION,
    CASTS,
    DROPOUT,
    RECURRENT,
    SAME,
    VIEWS,
    arguments,
    data_inputs,
    is_constant,
    is_data,
    is_row_wise,
    name_of,
)

# Nodes per candidate: bounds the work, and with it keeps the search linear in the size of the graph.
_LIMIT = 160
_MOST_LINEARS = 4  # more than two never match; up to four are looked at to recognise adapters

_MOVES = VIEWS | SAME | CASTS | DROPOUT | {"getitem", "expand"}


@dataclass(frozen=True)
class Region:
    """What stands between a down layer and the linear layers above it, in graph order."""

    down: Linear
    ups: tuple[Linear, ...]
    nodes: tuple[fx.Node, ...]
    blockers: tuple[fx.Node, ...]  # nodes that keep no rows apart, where the growth stopped


def grow(down: Linear, linears: Mapping[fx.Node, Linear], order: Mapping[fx.Node, int]) -> Region:
    """The region above ``down``. It is incomplete when there are blockers or too many linear layers."""
    heap = [(-order[down.x], down.x)]
    seen = {down.x}
    ups: list[Linear] = []
    nodes: list[fx.Node] = []
    blockers: list[fx.Node] = []
    while heap and len(nodes) < _LIMIT and len(ups) <= _MOST_LINEARS:
        _, node = heapq.heappop(heap)
        if node in linears:
            ups.append(linears[node])
            continue
        if node.op == "get_attr" or (node.op == "call_function" and not data_inputs(node)):
            continue
        if not is_row_wise(node):
            blockers.append(node)
            continue
        nodes.append(node)
        for before in data_inputs(node):
            if before not in seen:
                seen.add(before)
                heapq.heappush(heap, (-order[before], before))
    kept = _downstream_of([up.node for up in ups], nodes[::-1])
    return Region(down, tuple(ups[::-1]), kept, tuple(blockers))


def _downstream_of(sources: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Those of ``nodes`` (in graph order) that depend on a source; the others are computed from parameters."""
    reached = set(sources)
    kept = []
    for node in nodes:
        if any(before in reached for before in node.all_input_nodes):
            reached.add(node)
            kept.append(node)
    return tuple(kept)


def through_moves(node: fx.Node, names: frozenset[str] | set[str] = frozenset(VIEWS | SAME)) -> fx.Node:
    """The tensor that a node is a mere view of."""
    while name_of(node) in names and data_inputs(node):
        node = data_inputs(node)[0]
    return node


def blocker_reason(region: Region, linears: Mapping[fx.Node, Linear]) -> str | None:
    """Why a region with blockers is not a block; None when it does not even look like one."""
    for node in region.blockers:
        name = name_of(node)
        if name in ATTENTION or (name == "matmul" and not any(map(is_constant, data_inputs(node)))):
            return f"an attention output projection: {name} stands before it"
    for node in region.blockers:
        if not _hangs_on_linear(node, linears):
            continue
        name = name_of(node) or node.name
        if name in RECURRENT:
            continue
        if name.startswith("conv"):
            return f"a convolution ({name}) stands between the linear layers and mixes rows"
        if "batch_norm" in name:
            return f"{name} stands between the linear layers: its statistics mix rows in training"
        return f"{name} stands between the linear layers and mixes rows"
    return None


def _hangs_on_linear(node: fx.Node, linears: Mapping[fx.Node, Linear]) -> bool:
    """A linear layer feeds it through row-wise nodes of one operand."""
    for _ in range(16):
        inputs = [n for n in data_inputs(node) if not is_constant(n)]
        if not inputs:
            return False
        node = inputs[0]
        if node in linears:
            return True
        if not is_row_wise(node) or len(inputs) > 1:
            return False
    return False


def outside_readers(region: Region) -> list[fx.Node]:
    """Nodes outside the block that read the hidden value or anything it is made of; readers of sizes do not count."""
    inside = set(region.nodes) | {region.down.core} | {up.node for up in region.ups}
    readers = []
    for node in (*(up.node for up in region.ups), *region.nodes):
        readers += [user for user in node.users if user not in inside and (user.op == "output" or is_data(user))]
    return readers


def adapter(ups: Iterable[Linear], linears: Mapping[fx.Node, Linear]) -> bool:
    """One of the layers is the second half of a low-rank pair (LoRA)."""
    for up in ups:
        first = linears.get(through_moves(up.x, _MOVES))
        if first is not None and first.d_out < min(first.d_in, up.d_out):
            return True
    return False


def hidden_dropout(region: Region) -> float | None:
    """The rate of dropout of the hidden value, None when dropout acts where it cannot be moved to the hidden value."""
    late: set[fx.Node] = set()
    rate = 0.0
    passing = _MOVES | {"mul", "div"}
    for node in reversed(region.nodes):
        users = [user for user in node.users if user is not region.down.core and is_data(user)]
        if all(user in late and name_of(user) in passing for user in users):
            late.add(node)
        if name_of(node) in DROPOUT:
            if node not in late:
                return None
            rate = combined(rate, float(arguments(node)[1]))
    return rate


def combined(first: float, second: float) -> float:
    """The rate of two dropouts one after the other, exactly the other one when one of them is 0."""
    return first + second if not first or not second else 1.0 - (1.0 - first) * (1.0 - second)
