"""``moe.grouped_linear`` and the two reductions that are its weight and bias gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.ir import kernels, kernels_grouped, ops_check
from moeify.ir.ops_library import define


def _linear(rows_RI: Tensor, counts_E: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    op = "grouped_linear"
    if rows_RI.dim() != 2 or weight_EOI.dim() != 3 or weight_EOI.shape[2] != rows_RI.shape[1]:
        raise ValueError(
            f"moeify::{op}: rows have shape {list(rows_RI.shape)} and weight {list(weight_EOI.shape)}, "
            "expected [R, I] and [E, O, I]"
        )
    ops_check.shape(op, "bias", bias_EO, *weight_EOI.shape[:2])
    ops_check.grouped_counts(op, counts_E, rows_RI.shape[0], weight_EOI.shape[0])
    ops_check.same_dtype(op, rows_RI, weight=weight_EOI, bias=bias_EO)
    path = kernels_grouped if kernels_grouped.fits(rows_RI, weight_EOI) else kernels
    return path.linear(rows_RI, counts_E, weight_EOI, bias_EO)


def _linear_fake(rows_RI: Tensor, counts_E: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    return rows_RI.new_empty(rows_RI.shape[0], weight_EOI.shape[1])


def _linear_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _linear_backward(ctx: Any, grad_RO: Tensor) -> tuple:
    rows_RI, counts_E, weight_EOI = ctx.saved_tensors
    moe = torch.ops.moeify
    need_rows, _, need_weight, need_bias = ctx.needs_input_grad
    return (
        moe.grouped_linear(grad_RO, counts_E, weight_EOI.transpose(1, 2), None) if need_rows else None,
        None,
        moe.grouped_outer(grad_RO, rows_RI, counts_E) if need_weight else None,
        moe.grouped_sum(grad_RO, counts_E) if need_bias else None,
    )


def _outer(left_RO: Tensor, right_RI: Tensor, counts_E: Tensor) -> Tensor:
    op = "grouped_outer"
    if left_RO.dim() != 2 or right_RI.dim() != 2 or left_RO.shape[0] != right_RI.shape[0]:
        raise ValueError(
            f"moeify::{op}: left has shape {list(left_RO.shape)} and right {list(right_RI.shape)}, "
            "expected [R, O] and [R, I]"
        )
    ops_check.grouped_counts(op, counts_E, left_RO.shape[0], counts_E.shape[0])
    ops_check.same_dtype(op, left_RO, right=right_RI)
    path = kernels_grouped if kernels_grouped.fits(left_RO, right_RI) else kernels
    return path.outer(left_RO, right_RI, counts_E)


def _outer_fake(left_RO: Tensor, right_RI: Tensor, counts_E: Tensor) -> Tensor:
    return left_RO.new_empty(counts_E.shape[0], left_RO.shape[1], right_RI.shape[1])


def _sum(rows_RO: Tensor, counts_E: Tensor) -> Tensor:
    if rows_RO.dim() != 2:
        raise ValueError(f"moeify::grouped_sum: rows have shape {list(rows_RO.shape)}, expected [R, O]")
    ops_check.grouped_counts("grouped_sum", counts_E, rows_RO.shape[0], counts_E.shape[0])
    path = kernels_grouped if kernels_grouped.fits(rows_RO) else kernels
    return path.total(rows_RO, counts_E)


def _sum_fake(rows_RO: Tensor, counts_E: Tensor) -> Tensor:
    return rows_RO.new_empty(counts_E.shape[0], rows_RO.shape[1])


define(
    "grouped_linear(Tensor rows_RI, Tensor counts_E, Tensor weight_EOI, Tensor? bias_EO) -> Tensor",
    _linear,
    _linear_fake,
    setup_context=_linear_context,
    backward=_linear_backward,
)
define("grouped_outer(Tensor left_RO, Tensor right_RI, Tensor counts_E) -> Tensor", _outer, _outer_fake)
define("grouped_sum(Tensor rows_RO, Tensor counts_E) -> Tensor", _sum, _sum_fake)
