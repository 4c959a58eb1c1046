"""The ``moe.*`` operators in plain PyTorch: each a function that traces to ATen operators, gradients and all.

No function depends on the values of its tensors, but for the experts: rows of unequal groups are cut at sizes that
are read when the graph runs. Letters as in ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.ir.activations import lookup
from moeify.ir.kernels_grouped import expert_of_row
from moeify.ir.ops_groups import transpose_by_index

_moe = torch.ops.moeify


def permute(x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows_RD, counts_E, order_R) of a stable sort by expert."""
    flat_R = experts_TK.reshape(-1)
    order_R = flat_R.argsort(stable=True)
    zeros_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_R.device)
    counts_E = zeros_E.scatter_add(0, flat_R, torch.ones_like(flat_R))
    return x_TD.index_select(0, order_R // experts_TK.shape[1]), counts_E, order_R


def unpermute(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
    """``y[t] = sum_k weights[t, k] * rows[row of slot t * K + k]``."""
    T, K = weights_TK.shape
    copies_TKD = rows_RD.index_select(0, order_R.argsort()).view(T, K, rows_RD.shape[1])
    return torch.bmm(weights_TK.unsqueeze(1), copies_TKD).squeeze(1)


def local_counts(counts_WL: Tensor, weight_EOI: Tensor) -> Tensor:
    """The rows of each expert of the weight, from all ranks."""
    return counts_WL.sum(0)[: weight_EOI.shape[0]].clone()


def pad_groups(rows_RD: Tensor, counts_E: Tensor, size: int) -> Tensor:
    """[E, size, D]: the first rows of each expert; a place without one reads a row of zeros after the last."""
    place_C = torch.arange(size, device=rows_RD.device)
    source_EC = (counts_E.cumsum(0) - counts_E).unsqueeze(1) + place_C
    source_EC = torch.where(place_C < counts_E.unsqueeze(1), source_EC, rows_RD.shape[0])
    padded = _with_zeros(rows_RD).index_select(0, source_EC.reshape(-1))
    return padded.view(counts_E.shape[0], size, rows_RD.shape[1])


def unpad_groups(padded_ECD: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """The way back of ``pad_groups``: zero for the rows that had no place."""
    E, C = padded_ECD.shape[:2]
    expert_R = expert_of_row(counts_E, rows)
    start_R = (counts_E.cumsum(0) - counts_E).index_select(0, expert_R)
    place_R = torch.arange(rows, device=padded_ECD.device) - start_R
    source_R = torch.where(place_R < C, expert_R * C + place_R, E * C)
    return _with_zeros(padded_ECD.flatten(0, 1)).index_select(0, source_R)


def grouped_linear(rows_RI: Tensor, counts_E: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    """One linear layer per expert, one after the other."""
    parts = [F.linear(rows, weight_EOI[e], _of(bias_EO, e)) for e, rows in enumerate(_parts(rows_RI, counts_E))]
    return _joined(parts, rows_RI, weight_EOI.shape[1])


def experts(rows_RD: Tensor, counts_E: Tensor, *weights_and_activation: Any) -> Tensor:
    """One FFN per expert, one after the other."""
    up_EFD, gate_EFD, down_EDF, up_bias_EF, gate_bias_EF, down_bias_ED, activation = weights_and_activation
    act = lookup(activation).function
    parts = []
    for e, rows in enumerate(_parts(rows_RD, counts_E)):
        hidden = F.linear(rows, up_EFD[e], _of(up_bias_EF, e))
        if gate_EFD is None:
            hidden = act(hidden)
        else:
            hidden = act(F.linear(rows, gate_EFD[e], _of(gate_bias_EF, e))) * hidden
        parts.append(F.linear(hidden, down_EDF[e], _of(down_bias_ED, e)))
    return _joined(parts, rows_RD, down_EDF.shape[1])


def _parts(rows_RD: Tensor, counts_E: Tensor) -> list[Tensor]:
    """The rows of each expert. One copy to the CPU instead of a wait for the device for every number."""
    counts = counts_E.cpu().tolist()
    return list(rows_RD.split(counts)) if counts else []


def _joined(parts: list[Tensor], rows_RD: Tensor, width: int) -> Tensor:
    """A rank without experts has no rows, which must have a gradient all the same: the other ranks wait for it."""
    return torch.cat(parts) if parts else rows_RD @ rows_RD.new_zeros(rows_RD.shape[1], width)


def _of(bias_EO: Tensor | None, expert: int) -> Tensor | None:
    return None if bias_EO is None else bias_EO[expert]


def _with_zeros(rows_RD: Tensor) -> Tensor:
    return torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])


PLAIN: Mapping[Any, Callable[..., Any]] = {
    _moe.permute.default: permute,
    _moe.unpermute.default: unpermute,
    _moe.transpose_groups.default: transpose_by_index,
    _moe.local_counts.default: local_counts,
    _moe.pad_groups.default: pad_groups,
    _moe.unpad_groups.default: unpad_groups,
    _moe.grouped_linear.default: grouped_linear,
    _moe.experts.default: experts,
}
