"""``moe.all_to_all_rows`` and ``moe.all_to_all_even``: rows that change ranks.

``group`` is the name of a role (see ``roles``), so that a graph is the same on every rank and needs no process group
until it runs. Splits are tensors, so that the graph does not grow with the number of ranks; they are read as lists,
which costs a wait for the device unless they lie on the CPU. ``block`` is for errors.

Letters: W ranks, R rows, D width. The gradient of an exchange is the exchange with its splits swapped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.ir import roles
from moeify.ir.ops_library import define


def _rows(
    x_RD: Tensor, out_splits_W: Tensor, in_splits_W: Tensor, out_rows: int, group: str, group_size: int, block: str
) -> Tensor:
    op = "all_to_all_rows"
    out_splits, in_splits = out_splits_W.tolist(), in_splits_W.tolist()
    for name, splits, rows in (("out", out_splits, out_rows), ("in", in_splits, x_RD.shape[0])):
        if len(splits) != group_size or sum(splits) != rows:
            raise ValueError(
                f"moeify::{op}: {name}_splits are {len(splits)} numbers that add up to {sum(splits)}, expected "
                f"{group_size} for {rows} rows"
            )
    transport = roles.transport(group, group_size, block)
    return transport.all_to_all(x_RD.contiguous(), out_splits, in_splits, block)


def _rows_fake(
    x_RD: Tensor, out_splits_W: Tensor, in_splits_W: Tensor, out_rows: int, group: str, group_size: int, block: str
) -> Tensor:
    return x_RD.new_empty(out_rows, *x_RD.shape[1:])


def _rows_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_RD, out_splits_W, in_splits_W, _, ctx.group, ctx.group_size, ctx.block = inputs
    ctx.rows = x_RD.shape[0]
    ctx.save_for_backward(out_splits_W, in_splits_W)


def _rows_backward(ctx: Any, grad_RD: Tensor) -> tuple:
    out_splits_W, in_splits_W = ctx.saved_tensors
    back = torch.ops.moeify.all_to_all_rows(
        grad_RD, in_splits_W, out_splits_W, ctx.rows, ctx.group, ctx.group_size, ctx.block
    )
    return back, None, None, None, None, None, None


def _even(x: Tensor, group: str, group_size: int, block: str) -> Tensor:
    if x.dim() == 0 or x.shape[0] != group_size:
        raise ValueError(f"moeify::all_to_all_even: x has shape {list(x.shape)}, expected [{group_size}, ...]")
    ones = [1] * group_size
    return roles.transport(group, group_size, block).all_to_all(x.contiguous(), ones, ones, block)


def _even_fake(x: Tensor, group: str, group_size: int, block: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _even_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.group, ctx.group_size, ctx.block = inputs


def _even_backward(ctx: Any, grad: Tensor) -> tuple:
    return torch.ops.moeify.all_to_all_even(grad, ctx.group, ctx.group_size, ctx.block), None, None, None


define(
    "all_to_all_rows(Tensor x_RD, Tensor out_splits_W, Tensor in_splits_W, SymInt out_rows, str group, "
    "int group_size, str block) -> Tensor",
    _rows,
    _rows_fake,
    setup_context=_rows_context,
    backward=_rows_backward,
)
define(
    "all_to_all_even(Tensor x, str group, int group_size, str block) -> Tensor",
    _even,
    _even_fake,
    setup_context=_even_context,
    backward=_even_backward,
)
