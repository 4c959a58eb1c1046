"""The nodes of a mixture, built piece by piece: tokens flattened, routed experts, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from moeify.ir.block import Block
from moeify.ir.emit import Emitter
from moeify.ir.inline import activate, inline

_aten = torch.ops.aten
_moe = torch.ops.moeify

FFN_ROLES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


def flatten_tokens(emit: Emitter, x: fx.Node) -> fx.Node:
    """``[..., D]`` to ``[T, D]``; the node itself when it has that shape."""
    shape = x.meta["val"].shape
    if len(shape) == 2:
        return x
    return emit.call("dispatch", _aten.reshape.default, x, [-1, shape[-1]])


def unflatten_tokens(emit: Emitter, y_TD: fx.Node, x: fx.Node) -> fx.Node:
    """``[T, D]`` back to the leading dimensions of ``x``."""
    leading = x.meta["val"].dim() - 1
    if leading == 1:
        return y_TD
    sizes = [_size(emit, x, dim) for dim in range(leading)]
    return emit.call("dispatch", _aten.reshape.default, y_TD, [*sizes, y_TD.meta["val"].shape[-1]])


def uniform_routing(
    emit: Emitter, x_TD: fx.Node, num_experts: int, weight: float | None = None
) -> tuple[fx.Node, fx.Node]:
    """All experts for every token, each with ``weight``, None for 1 / E: ``(experts_TE, weights_TE)``."""
    val = x_TD.meta["val"]
    tokens = _size(emit, x_TD, 0, "router")
    arange = emit.call(
        "router", _aten.arange.default, num_experts, dtype=torch.int64, device=val.device, pin_memory=False
    )
    experts = emit.call("router", _aten.expand.default, arange, [tokens, num_experts])
    weights = emit.call(
        "router",
        _aten.full.default,
        [tokens, num_experts],
        1.0 / num_experts if weight is None else weight,
        dtype=val.dtype,
        device=val.device,
        pin_memory=False,
    )
    return experts, weights


def routed_experts(
    emit: Emitter,
    block: Block,
    weights: Mapping[str, str],
    num_experts: int,
    x_TD: fx.Node,
    experts_TK: fx.Node,
    weights_TK: fx.Node,
    train: Any = False,
) -> fx.Node:
    """The experts' output [T, D]. ``weights`` maps roles to names of stacked parameters."""
    read = {role: emit.parameter("experts", weights[role]) for role in FFN_ROLES if role in weights}
    if block.region is None and not block.hidden_dropout:
        stacked = [read.get(role) for role in FFN_ROLES]
        return emit.call("experts", _moe.dispatch_ffn.default, x_TD, experts_TK, weights_TK, *stacked, block.activation)
    permuted = emit.call("dispatch", _moe.permute.default, x_TD, experts_TK, num_experts)
    rows, counts, order = (emit.getitem("dispatch", permuted, i) for i in range(3))

    def linear(value: fx.Node, role: str) -> fx.Node:
        bias = read.get(f"{role}_bias")
        return emit.call("experts", _moe.grouped_linear.default, value, counts, read[role], bias)

    pre = [linear(rows, role) for role in ("up", "gate") if role in read]
    out = linear(hidden_value(emit, block, pre, "experts", train), "down")
    return emit.call("dispatch", _moe.unpermute.default, out, order, weights_TK)


def shared_experts(
    emit: Emitter, block: Block, weights: Mapping[str, str], gate: str | None, x_TD: fx.Node, train: Any = False
) -> fx.Node:
    """The always-on experts' output [T, D]: one wide dense FFN, times ``sigmoid(gate x)`` when there is a gate."""
    role = "shared"
    read = {r: emit.parameter(role, weights[r]) for r in FFN_ROLES if r in weights}
    if block.region is None:
        args = [read.get(r) for r in FFN_ROLES]
        y_TD = emit.call(role, _moe.ffn.default, x_TD, *args, block.activation, block.hidden_dropout, train)
    else:
        pre = [
            emit.call(role, _aten.linear.default, x_TD, read[r], read.get(f"{r}_bias"))
            for r in ("up", "gate")
            if r in read
        ]
        y_TD = emit.call(
            role,
            _aten.linear.default,
            _region_by_copies(emit, block, pre, role),
            read["down"],
            read.get("down_bias"),
        )
    if gate is None:
        return y_TD
    logit = emit.call(role, _aten.linear.default, x_TD, emit.parameter(role, gate))
    return emit.call(role, _aten.mul.Tensor, y_TD, emit.call(role, _aten.sigmoid.default, logit))


def hidden_value(emit: Emitter, block: Block, pre: list[fx.Node], role: str, train: Any) -> fx.Node:
    """``act(up)``, ``act(gate) * up`` or the block's own region; ``pre`` is ``[up]`` or ``[up, gate]`` over rows."""
    if block.region is not None:
        result = inline(emit, block.region, pre, str, role)
        return result[0] if isinstance(result, (tuple, list)) else result
    hidden = activate(emit, block.activation, pre[-1], role)
    if len(pre) == 2:
        hidden = emit.call(role, _aten.mul.Tensor, hidden, pre[0])
    if block.hidden_dropout:
        hidden = emit.call(role, _aten.dropout.default, hidden, block.hidden_dropout, train)
    return hidden


def _region_by_copies(emit: Emitter, block: Block, pre: list[fx.Node], role: str) -> fx.Node:
    """The region over ``[T, S*F]``, as rows of width F: it may hold a norm or parameters of that width.

    A part of the hidden units, narrower than F, goes as it is: only a pointwise region is ever cut.
    """
    width = pre[0].meta["val"].shape[1]
    if width <= block.d_ff:
        return hidden_value(emit, block, pre, role, False)
    rows = [emit.call(role, _aten.reshape.default, node, [-1, block.d_ff]) for node in pre]
    hidden = hidden_value(emit, block, rows, role, False)
    return emit.call(role, _aten.reshape.default, hidden, [_size(emit, pre[0], 0), width])


def _size(emit: Emitter, node: fx.Node, dim: int, role: str = "dispatch") -> Any:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else emit.call(role, _aten.sym_size.int, node, dim)
