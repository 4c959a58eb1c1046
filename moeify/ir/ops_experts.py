"""``moe.experts`` and ``moe.dispatch_ffn``: the experts' FFN over sorted rows, and over tokens.

Neither saves a hidden value: the backward pass computes the preactivations again, which costs one grouped product (two
when gated) and keeps the memory between forward and backward at the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.ir import kernels, kernels_grouped, ops_check, ops_permute
from moeify.ir.activations import lookup
from moeify.ir.ops_library import define

_WEIGHTS = (
    "Tensor up_EFD, Tensor? gate_EFD, Tensor down_EDF, "
    "Tensor? up_bias_EF, Tensor? gate_bias_EF, Tensor? down_bias_ED, str activation"
)
_ROLES = 6


def _experts(rows_RD: Tensor, counts_E: Tensor, *weights_and_activation: Any) -> Tensor:
    *weights, activation = weights_and_activation
    act = lookup(activation)
    _check("experts", rows_RD, weights)
    ops_check.grouped_counts("experts", counts_E, rows_RD.shape[0], weights[0].shape[0])
    path = kernels_grouped if kernels_grouped.fits(rows_RD, *weights[:3]) else kernels
    return path.ffn(rows_RD, None, counts_E, *weights, act)


def _experts_fake(rows_RD: Tensor, counts_E: Tensor, *weights_and_activation: Any) -> Tensor:
    return rows_RD.new_empty(rows_RD.shape[0], weights_and_activation[2].shape[1])


def _experts_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.activation = inputs[-1]


def _experts_backward(ctx: Any, grad_RD: Tensor) -> tuple:
    rows, counts, *weights = ctx.saved_tensors
    need_rows, _, *need, _ = ctx.needs_input_grad
    hidden = _Hidden(rows, counts, weights, ctx.activation)
    grad_hidden = hidden.gradient(grad_RD) if need_rows or any(need[i] for i in (0, 1, 3, 4)) else None
    grad_rows, grads = hidden.backward(grad_hidden, grad_RD, need_rows, need)
    return grad_rows, None, *grads, None


def _dispatch(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *weights_and_activation: Any) -> Tensor:
    weights: list[Any]
    *weights, activation = weights_and_activation
    act = lookup(activation)
    ops_check.routing("dispatch_ffn", x_TD, experts_TK, weights_TK)
    ops_check.same_dtype("dispatch_ffn", x_TD, weights=weights_TK)
    _check("dispatch_ffn", x_TD, weights)
    counts_E, order_R = ops_permute.sort(experts_TK, weights[0].shape[0])
    token_R = order_R // experts_TK.shape[1]
    path: Any = kernels
    if kernels_grouped.fits(x_TD, *weights[:3]):
        path = kernels_grouped
    else:
        token_R = token_R[: int(counts_E.sum())]
    rows_RD = path.ffn(x_TD, token_R, counts_E, *weights, act)
    return ops_permute.combine(rows_RD, order_R, weights_TK)


def _dispatch_fake(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *weights_and_activation: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weights_and_activation[2].shape[1])


def _dispatch_backward(ctx: Any, grad_TD: Tensor) -> tuple:
    """A token's weight has the gradient ``(grad @ down) . hidden + grad . down_bias``: no expert's output is needed."""
    x, experts, gates, *weights = ctx.saved_tensors
    need_x, _, need_gates, *need, _ = ctx.needs_input_grad
    rows, counts, order = torch.ops.moeify.permute(x, experts, weights[0].shape[0])
    hidden = _Hidden(rows, counts, weights, ctx.activation)
    grad_plain = grad_TD.index_select(0, order // experts.shape[1])
    gate = gates.reshape(-1).index_select(0, order).unsqueeze(1)
    grad_hidden = hidden.gradient(grad_plain) if need_x or need_gates or any(need[i] for i in (0, 1, 3, 4)) else None
    grad_gates = None
    if need_gates and grad_hidden is not None:
        dots = ops_permute.dot(grad_hidden, hidden.value)
        if weights[5] is not None:
            expert = experts.reshape(-1).index_select(0, order)
            there = expert < weights[5].shape[0]
            bias = weights[5].index_select(0, expert.clamp(max=weights[5].shape[0] - 1))
            dots = dots + torch.where(there, ops_permute.dot(grad_plain, bias), 0)
        grad_gates = ops_permute.to_slots(dots, order).view(gates.shape)
    scaled = None if grad_hidden is None else grad_hidden * gate
    grad_rows, grads = hidden.backward(scaled, grad_plain * gate, need_x, need)
    grad_x = None
    if grad_rows is not None:
        grad_x = torch.ops.moeify.unpermute(grad_rows, order, grad_rows.new_ones(experts.shape))
    return grad_x, None, grad_gates, *grads, None


class _Hidden:
    """The hidden value of sorted rows, computed again, and the way back through it."""

    def __init__(self, rows: Tensor, counts: Tensor, weights: list[Any], activation: str) -> None:
        self.rows, self.counts = rows, counts
        self.up, self.gate, self.down, up_bias, gate_bias, _ = weights
        self.act = lookup(activation)
        linear = torch.ops.moeify.grouped_linear
        self.pre_up = linear(rows, counts, self.up, up_bias)
        if self.gate is None:
            self.value = self.act(self.pre_up)
        else:
            self.pre_gate = linear(rows, counts, self.gate, gate_bias)
            self.act_gate = self.act(self.pre_gate)
            self.value = self.act_gate * self.pre_up

    def gradient(self, grad_out: Tensor) -> Tensor:
        """The gradient of the hidden value for a gradient of the output rows."""
        return torch.ops.moeify.grouped_linear(grad_out, self.counts, self.down.transpose(1, 2), None)

    def backward(
        self, grad_hidden: Tensor | None, grad_out: Tensor, need_rows: bool, need: list[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of the rows and of the weights in the order of their roles, None where not needed."""
        moe = torch.ops.moeify
        grads: list[Tensor | None] = [None] * _ROLES
        if need[2]:
            grads[2] = moe.grouped_outer(grad_out, self.value, self.counts)
        if need[5]:
            grads[5] = moe.grouped_sum(grad_out, self.counts)
        if grad_hidden is None:
            return None, grads
        if self.gate is None:
            sides = [(0, 3, self.up, self.act.backward(grad_hidden, self.pre_up))]
        else:
            through_act = self.act.backward(grad_hidden * self.pre_up, self.pre_gate)
            sides = [(0, 3, self.up, grad_hidden * self.act_gate), (1, 4, self.gate, through_act)]
        grad_rows = None
        for weight_role, bias_role, weight, grad in sides:
            if need[weight_role]:
                grads[weight_role] = moe.grouped_outer(grad, self.rows, self.counts)
            if need[bias_role]:
                grads[bias_role] = moe.grouped_sum(grad, self.counts)
            if need_rows:
                part = moe.grouped_linear(grad, self.counts, weight.transpose(1, 2), None)
                grad_rows = part if grad_rows is None else grad_rows + part
        return grad_rows, grads


def _check(op: str, rows: Tensor, weights: list[Any]) -> None:
    if rows.dim() != 2:
        raise ValueError(f"moeify::{op}: the rows have shape {list(rows.shape)}, expected [rows, D]")
    ops_check.expert_weights(op, rows.shape[1], *weights)
    ops_check.same_dtype(op, rows, **dict(zip(ops_check.WEIGHT_ROLES, weights)))


define(
    f"experts(Tensor rows_RD, Tensor counts_E, {_WEIGHTS}) -> Tensor",
    _experts,
    _experts_fake,
    setup_context=_experts_context,
    backward=_experts_backward,
)
define(
    f"dispatch_ffn(Tensor x_TD, Tensor experts_TK, Tensor weights_TK, {_WEIGHTS}) -> Tensor",
    _dispatch,
    _dispatch_fake,
    setup_context=_experts_context,
    backward=_dispatch_backward,
)
