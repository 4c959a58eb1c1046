"""``moe.permute`` and ``moe.unpermute``: token copies sorted by expert, and their weighted sum back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.ir import ops_check
from moeify.ir.ops_library import define


def sort(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(counts_E, order_R) of a stable sort by expert, slots without one (the number E) last and not counted. Raises
    IndexError, on the CPU, for an expert that does not exist.

    CUDA counts by scatter_add: bincount would wait for the device.
    """
    flat_R = experts_TK.reshape(-1)
    order_R = flat_R.argsort(stable=True)
    if flat_R.device.type != "cpu":
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_R.device)
        return counts.scatter_add_(0, flat_R, torch.ones_like(flat_R))[:num_experts].clone(), order_R
    if flat_R.numel():
        least, most = int(flat_R[order_R[0]]), int(flat_R[order_R[-1]])
        if least < 0 or most > num_experts:
            wrong = least if least < 0 else most
            raise IndexError(f"moeify: expert {wrong} does not exist, there are {num_experts}")
    return torch.bincount(flat_R, minlength=num_experts)[:num_experts].clone(), order_R


def invert(order_R: Tensor) -> Tensor:
    """The sorted row of each flat slot ``t * K + k``."""
    rank_R = torch.empty_like(order_R)
    return rank_R.scatter_(0, order_R, torch.arange(order_R.shape[0], device=order_R.device))


def combine(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """``y[t] = sum_k weights[t, k] * rows[row of slot t * K + k]``; rows at the end, of no expert, may be left out."""
    T, K = weights_TK.shape
    used = rows_RD.shape[0]
    if used < T * K:
        order_R = order_R[:used]
        weighted_RD = rows_RD * weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(1)
        return rows_RD.new_zeros(T, rows_RD.shape[1]).index_add_(0, order_R // K, weighted_RD)
    copies_TKD = rows_RD.index_select(0, invert(order_R)).view(T, K, rows_RD.shape[1])
    return torch.bmm(weights_TK.unsqueeze(1), copies_TKD).squeeze(1)


def _permute(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ops_check.routing("permute", x_TD, experts_TK)
    counts_E, order_R = sort(experts_TK, num_experts)
    return x_TD.index_select(0, order_R // experts_TK.shape[1]), counts_E, order_R


def _permute_fake(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    T, K = experts_TK.shape
    return (
        x_TD.new_empty(T * K, x_TD.shape[1]),
        experts_TK.new_empty(num_experts, dtype=torch.int64),
        experts_TK.new_empty(T * K, dtype=torch.int64),
    )


def _permute_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.slots = inputs[1].shape
    ctx.save_for_backward(output[2])


def _permute_backward(ctx: Any, grad_RD: Tensor | None, *_: Any) -> tuple:
    if grad_RD is None:
        return None, None, None
    (order_R,) = ctx.saved_tensors
    return torch.ops.moeify.unpermute(grad_RD, order_R, grad_RD.new_ones(ctx.slots)), None, None


def _unpermute(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    R = weights_TK.numel()
    if weights_TK.dim() != 2 or rows_RD.dim() != 2 or rows_RD.shape[0] != R:
        raise ValueError(
            f"moeify::unpermute: rows have shape {list(rows_RD.shape)} and weights {list(weights_TK.shape)}, "
            "expected [T * K, D] and [T, K]"
        )
    ops_check.shape("unpermute", "order", order_R, R)
    ops_check.same_dtype("unpermute", rows_RD, weights=weights_TK)
    return combine(rows_RD, order_R, weights_TK)


def _unpermute_fake(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    return rows_RD.new_empty(weights_TK.shape[0], rows_RD.shape[1])


def _unpermute_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx: Any, grad_TD: Tensor) -> tuple:
    rows_RD, order_R, weights_TK = ctx.saved_tensors
    need_rows, _, need_weights = ctx.needs_input_grad
    grad_RD = grad_TD.index_select(0, order_R // weights_TK.shape[1])
    grad_rows = grad_weights = None
    if need_rows:
        grad_rows = grad_RD * weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(1)
    if need_weights:
        grad_weights = to_slots(dot(grad_RD, rows_RD), order_R).view(weights_TK.shape)
    return grad_rows, None, grad_weights


def dot(left_RD: Tensor, right_RD: Tensor) -> Tensor:
    """The dot product of each pair of rows, accumulated by the matrix kernel in its wide type."""
    return torch.bmm(left_RD.unsqueeze(1), right_RD.unsqueeze(2)).view(-1)


def to_slots(value_R: Tensor, order_R: Tensor) -> Tensor:
    """Values of sorted rows at their flat slots."""
    return torch.empty_like(value_R).scatter(0, order_R, value_R)


define(
    "permute(Tensor x_TD, Tensor experts_TK, SymInt num_experts) -> (Tensor rows_RD, Tensor counts_E, Tensor order_R)",
    _permute,
    _permute_fake,
    setup_context=_permute_context,
    backward=_permute_backward,
)
define(
    "unpermute(Tensor rows_RD, Tensor order_R, Tensor weights_TK) -> Tensor",
    _unpermute,
    _unpermute_fake,
    setup_context=_unpermute_context,
    backward=_unpermute_backward,
)
