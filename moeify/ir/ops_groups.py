"""Operators on groups of rows: their order swapped, counted for this rank's experts, padded to one size and back.

Letters: A and B two keys that rows are sorted by, C rows of a padded group, R rows, E experts, W ranks, L experts of a
rank (of the fullest one, where they differ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.ir import kernels, ops_check
from moeify.ir.kernels_grouped import expert_of_row
from moeify.ir.ops_library import define


def transpose_by_parts(rows_RD: Tensor, counts_AB: Tensor) -> Tensor:
    """One copy of a contiguous part per pair of keys: what the CPU does."""
    A, B = counts_AB.shape
    parts = rows_RD.split(counts_AB.reshape(-1).tolist())
    return torch.cat([parts[a * B + b] for b in range(B) for a in range(A)])


def transpose_by_index(rows_RD: Tensor, counts_AB: Tensor) -> Tensor:
    """A gather; no wait for the device."""
    A, B = counts_AB.shape
    part_R = expert_of_row(counts_AB.reshape(-1), rows_RD.shape[0])
    key_R = (part_R % B) * A + part_R // B
    return rows_RD.index_select(0, key_R.argsort(stable=True))


def _transpose(rows_RD: Tensor, counts_AB: Tensor) -> Tensor:
    op = "transpose_groups"
    if counts_AB.dim() != 2:
        raise ValueError(f"moeify::{op}: counts have shape {list(counts_AB.shape)}, expected [A, B]")
    ops_check.counts(op, counts_AB.reshape(-1), rows_RD.shape[0], counts_AB.numel())
    if 1 in counts_AB.shape:
        return rows_RD.clone(memory_format=torch.contiguous_format)
    path = transpose_by_parts if rows_RD.device.type == "cpu" else transpose_by_index
    return path(rows_RD, counts_AB)


def _transpose_fake(rows_RD: Tensor, counts_AB: Tensor) -> Tensor:
    return torch.empty_like(rows_RD, memory_format=torch.contiguous_format)


def _transpose_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _transpose_backward(ctx: Any, grad_RD: Tensor) -> tuple:
    (counts_AB,) = ctx.saved_tensors
    return torch.ops.moeify.transpose_groups(grad_RD, counts_AB.t()), None


def _local_counts(counts_WL: Tensor, weight_EOI: Tensor) -> Tensor:
    """Experts beyond those of the weight do not exist: the last ranks may have fewer than L."""
    if counts_WL.dim() != 2 or counts_WL.shape[1] < weight_EOI.shape[0]:
        raise ValueError(
            f"moeify::local_counts: counts have shape {list(counts_WL.shape)} and the weight holds "
            f"{weight_EOI.shape[0]} experts"
        )
    return counts_WL.sum(0)[: weight_EOI.shape[0]].clone()


def _local_counts_fake(counts_WL: Tensor, weight_EOI: Tensor) -> Tensor:
    return counts_WL.new_empty(weight_EOI.shape[0])


def pad_by_parts(rows_RD: Tensor, counts_E: Tensor, size: int) -> Tensor:
    """One copy per expert that has rows: what the CPU does."""
    padded_ECD = rows_RD.new_zeros(counts_E.shape[0], size, *rows_RD.shape[1:])
    for e, part in kernels.slices(counts_E):
        kept = min(part.stop - part.start, size)
        padded_ECD[e, :kept] = rows_RD[part.start : part.start + kept]
    return padded_ECD


def unpad_by_parts(padded_ECD: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """The way back of ``pad_by_parts``."""
    rows_RD = padded_ECD.new_zeros(rows, *padded_ECD.shape[2:])
    for e, part in kernels.slices(counts_E):
        kept = min(part.stop - part.start, padded_ECD.shape[1])
        rows_RD[part.start : part.start + kept] = padded_ECD[e, :kept]
    return rows_RD


def pad_by_index(rows_RD: Tensor, counts_E: Tensor, size: int) -> Tensor:
    """A gather; no wait for the device."""
    E, R, shape = counts_E.shape[0], rows_RD.shape[0], rows_RD.shape[1:]
    if not R or not size:
        return rows_RD.new_zeros(E, size, *shape)
    place_C = torch.arange(size, device=rows_RD.device)
    source_EC = (counts_E.cumsum(0) - counts_E).unsqueeze(1) + place_C
    there_EC = place_C < counts_E.unsqueeze(1)
    gathered = rows_RD.index_select(0, source_EC.clamp(max=R - 1).view(-1)).view(E, size, *shape)
    return torch.where(there_EC.unsqueeze(-1), gathered, 0)


def unpad_by_index(padded_ECD: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """A gather; no wait for the device."""
    C = padded_ECD.shape[1]
    if not rows or not C:
        return padded_ECD.new_zeros(rows, *padded_ECD.shape[2:])
    expert_R = expert_of_row(counts_E, rows)
    start_R = (counts_E.cumsum(0) - counts_E).index_select(0, expert_R)
    place_R = torch.arange(rows, device=padded_ECD.device) - start_R
    gathered = padded_ECD.flatten(0, 1).index_select(0, expert_R * C + place_R.clamp(max=C - 1))
    return torch.where((place_R < C).unsqueeze(-1), gathered, 0)


def _pad(rows_RD: Tensor, counts_E: Tensor, size: int) -> Tensor:
    ops_check.counts("pad_groups", counts_E, rows_RD.shape[0], counts_E.shape[0])
    path = pad_by_parts if rows_RD.device.type == "cpu" else pad_by_index
    return path(rows_RD, counts_E, size)


def _pad_fake(rows_RD: Tensor, counts_E: Tensor, size: int) -> Tensor:
    return rows_RD.new_empty(counts_E.shape[0], size, *rows_RD.shape[1:])


def _pad_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _pad_backward(ctx: Any, grad_ECD: Tensor) -> tuple:
    (counts_E,) = ctx.saved_tensors
    return torch.ops.moeify.unpad_groups(grad_ECD, counts_E, ctx.rows), None, None


def _unpad(padded_ECD: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    ops_check.counts("unpad_groups", counts_E, rows, padded_ECD.shape[0])
    path = unpad_by_parts if padded_ECD.device.type == "cpu" else unpad_by_index
    return path(padded_ECD, counts_E, rows)


def _unpad_fake(padded_ECD: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    return padded_ECD.new_empty(rows, *padded_ECD.shape[2:])


def _unpad_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.size = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1])


def _unpad_backward(ctx: Any, grad_RD: Tensor) -> tuple:
    (counts_E,) = ctx.saved_tensors
    return torch.ops.moeify.pad_groups(grad_RD, counts_E, ctx.size), None, None


define(
    "transpose_groups(Tensor rows_RD, Tensor counts_AB) -> Tensor",
    _transpose,
    _transpose_fake,
    setup_context=_transpose_context,
    backward=_transpose_backward,
)
define("local_counts(Tensor counts_WL, Tensor weight_EOI) -> Tensor", _local_counts, _local_counts_fake)
define(
    "pad_groups(Tensor rows_RD, Tensor counts_E, SymInt size) -> Tensor",
    _pad,
    _pad_fake,
    setup_context=_pad_context,
    backward=_pad_backward,
)
define(
    "unpad_groups(Tensor padded_ECD, Tensor counts_E, SymInt rows) -> Tensor",
    _unpad,
    _unpad_fake,
    setup_context=_unpad_context,
    backward=_unpad_backward,
)
