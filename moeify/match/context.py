"""What stands around a candidate decides whether it is a feed-forward block."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from moeify.match.axes import reordering
from moeify.match.linear import LINEAR_NAMES, Linear
from moeify.match.ops import (
    CASTS,
    DROPOUT,
    NORMS,
    SAME,
    VIEWS,
    arguments,
    data_inputs,
    hints,
    is_constant,
    is_data,
    is_pointwise,
    is_row_wise,
    name_of,
)
from moeify.match.region import through_moves

_FORWARD = 80  # nodes looked at after a candidate
_BACKWARD = 600  # nodes looked at between a residual operand and the candidate's input
_LINEAR_OPS = VIEWS | SAME | CASTS | DROPOUT | {"getitem", "expand", "add", "sub", "neg", "cat", "slice", "chunk"}
_ADDS = {"add", "sub", "rsub", "addcmul", "lerp"}
_DERIVED = 12  # nodes looked at between a residual operand and the tensor that it is a scaled or cast copy of


@dataclass
class Surroundings:
    """Where a candidate's result goes."""

    residual: fx.Node | None = None  # the ancestor of the input that the result is added to, as it is or rescaled
    scales_input: bool = False
    broadcast: bool = False
    terminal: bool = False
    feeds_chain: bool = False


def surroundings(x: fx.Node, y: fx.Node, order: Mapping[fx.Node, int]) -> Surroundings:
    """Follow the result forward over row-wise nodes until it meets an ancestor of ``x``."""
    found = Surroundings()
    heap: list[tuple[int, fx.Node, bool]] = [(order[y], y, False)]
    seen = {y}
    while heap and len(seen) < _FORWARD:
        _, node, bent = heapq.heappop(heap)
        for user in node.users:
            if user in seen or not (user.op == "output" or is_data(user)):
                continue
            seen.add(user)
            if user.op == "output":
                found.terminal = True
                continue
            name = name_of(user)
            if not is_row_wise(user):
                if name in LINEAR_NAMES and bent:
                    found.feeds_chain = True
                continue
            others = [n for n in data_inputs(user) if n not in seen and not is_constant(n)]
            if name in _ADDS or name == "mul":
                for other in others:
                    same_size = hints(other) == hints(user) == hints(node)
                    if not is_ancestor(other, x, order):
                        if name != "mul" and same_size and (origin := _origin(other, x, order)) is not None:
                            found.residual = origin
                            return found
                        continue
                    if name == "mul":
                        found.scales_input = True
                    elif not same_size:
                        found.broadcast = True
                    else:
                        found.residual = other
                    return found
            curved = is_pointwise(user) and name not in _LINEAR_OPS | {"mul", "div"}
            heapq.heappush(heap, (order[user], user, bent or curved))
    return found


def is_ancestor(node: fx.Node, of: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """``of`` depends on ``node``, or is it."""
    if node is of:
        return True
    first = order[node]
    if first > order[of]:
        return False
    pending, seen = [of], {of}
    while pending and len(seen) < _BACKWARD:
        for before in pending.pop().all_input_nodes:
            if before is node:
                return True
            if before not in seen and order[before] > first:
                seen.add(before)
                pending.append(before)
    return False


def _origin(node: fx.Node, x: fx.Node, order: Mapping[fx.Node, int]) -> fx.Node | None:
    """The ancestor of ``x`` that ``node`` is a scaled, cast or gated copy of."""
    pending, seen = [node], {node}
    while pending and len(seen) < _DERIVED:
        derived = pending.pop()
        if not (is_pointwise(derived) or name_of(derived) in SAME | DROPOUT | VIEWS):
            continue
        for before in data_inputs(derived):
            if is_ancestor(before, x, order):
                return before
            if before not in seen and not is_constant(before):
                seen.add(before)
                pending.append(before)
    return None


def chain_above(x: fx.Node, linears: Mapping[fx.Node, Linear]) -> Linear | None:
    """The linear layer that feeds ``x`` through a nonlinearity and nothing else: the layer before in an MLP."""
    bent = False
    node = x
    for _ in range(24):
        if node in linears:
            return linears[node] if bent else None
        inputs = [n for n in data_inputs(node) if not is_constant(n)]
        if not is_row_wise(node) or not inputs:
            return None
        sources = {id(n) for n in inputs}
        if len(sources) != 1:
            # an activation spelled out (x * sigmoid(x), tanh-gelu) reads one value several times
            common = _single_source(node)
            if common is None:
                return None
            bent, node = True, common
            continue
        if is_pointwise(node) and name_of(node) not in _LINEAR_OPS | {"mul", "div"}:
            bent = True
        node = inputs[0]
    return None


def _single_source(node: fx.Node, limit: int = 16) -> fx.Node | None:
    """The one tensor from which pointwise nodes compute ``node``, if there is one within a few steps."""
    pending = [node]
    for _ in range(limit):
        # always open the node that comes last in the graph
        pending.sort(key=_position)
        top = pending.pop()
        if not is_pointwise(top):
            return None
        for before in data_inputs(top):
            if before not in pending and not is_constant(before):
                pending.append(before)
        if len(pending) == 1 and pending[0] is not node:
            return pending[0]
        if not pending:
            return None
    return None


def _position(node: fx.Node) -> Any:
    return node._sort_key


def refusal(
    x: fx.Node,
    down: Linear,
    d_in: int,
    d_ff: int,
    around: Surroundings,
    rows: str,
    linears: Mapping[fx.Node, Linear],
    order: Mapping[fx.Node, int],
) -> str | None:
    """Why the candidate is no feed-forward block, None if it is one."""
    above = chain_above(x, linears)
    if around.scales_input:
        return "its result scales its own input (squeeze and excite)"
    if around.broadcast:
        return "its result is broadcast when it is added to the residual"
    if around.residual is not None:
        if above is not None and order[above.core] > order[around.residual]:
            return "it is a part of a chain of more than two linear layers"
        return None
    if around.terminal:
        return "an output head: its result is the model's output, with no residual connection"
    if above is not None or around.feeds_chain:
        return "it is a part of a chain of linear layers, with no residual connection"
    if d_in != down.d_out:
        return f"no residual connection, and it maps {d_in} features to {down.d_out}"
    if d_ff <= d_in:
        return f"no residual connection, and its hidden width {d_ff} is not above {d_in}"
    if rows != "token":
        return "no residual connection, and one row per example"
    return None


def is_head(linear: Linear, order: Mapping[fx.Node, int]) -> bool:
    """Its result reaches the output over nodes of one operand."""
    pending, seen = [linear.node], {linear.node}
    while pending and len(seen) < _FORWARD:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            one = len([n for n in data_inputs(user) if not is_constant(n)]) == 1
            if user not in seen and is_row_wise(user) and is_data(user) and one:
                seen.add(user)
                pending.append(user)
    return False


def row_kind(x: fx.Node, x_axis: int, batch_sizes: frozenset[str], linears: Mapping[fx.Node, Linear]) -> str:
    """``token``, ``sample`` (one row per example) or ``channel`` (the features are positions: a token-mixing MLP)."""
    if _mixes_positions(x, x_axis, linears):
        return "channel"
    val = x.meta["val"]
    rows = [str(size) for dim, size in enumerate(val.shape) if dim != x_axis and str(size) != "1"]
    return "sample" if not rows or (len(rows) == 1 and rows[0] in batch_sizes) else "token"


def _mixes_positions(x: fx.Node, axis: int, linears: Mapping[fx.Node, Linear]) -> bool:
    """Followed back over views, the feature axis is not the one that a norm or layer works along."""
    node = x
    for _ in range(24):
        name = name_of(node)
        if node in linears:
            return linears[node].out_axis != axis
        if name in NORMS:
            return axis < len(hints(node)) - len(arguments(node)[1])
        if name == "embedding":
            return axis != len(hints(node)) - 1
        inputs = [n for n in data_inputs(node) if not is_constant(n)]
        if not inputs or not is_row_wise(node):
            return False
        before = inputs[0]
        if name in ("transpose", "permute", "t", "mT", "numpy_T", "movedim", "swapaxes"):
            axis = reordering(node, len(hints(before)))[axis]
        elif hints(before) != hints(node):
            if hints(before)[-1:] == hints(node)[-1:] and axis == len(hints(node)) - 1:
                axis = len(hints(before)) - 1
            else:
                return False
        node = before
    return False


def same_tensor(ups: tuple[Linear, ...]) -> bool:
    """All layers read the same tensor, up to views."""
    return len({through_moves(up.x) for up in ups}) == 1
