"""Grouped products over rows sorted by expert: one GEMM per expert that has rows, no token loop, no mask.

These run on every device. Reading ``counts_E`` as a list waits for the device once per call; ``kernels_grouped`` holds the path
that does not. Letters: R rows, I and O inner and outer width, E experts, D, F as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moeify.ir.activations import Activation


def slices(counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, slice(start, start + count)
            start += count


def linear(rows_RI: Tensor, counts_E: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    """``rows[r] @ weight[e].T + bias[e]`` for the expert e of row r."""
    out_RO = rows_RI.new_empty(rows_RI.shape[0], weight_EOI.shape[1])
    for e, part in slices(counts_E):
        _linear_into(out_RO[part], rows_RI[part], weight_EOI[e], None if bias_EO is None else bias_EO[e])
    return out_RO


def outer(left_RO: Tensor, right_RI: Tensor, counts_E: Tensor) -> Tensor:
    """``left[rows of e].T @ right[rows of e]`` for every expert: [E, O, I], zero for an expert without rows."""
    out_EOI = left_RO.new_zeros(counts_E.shape[0], left_RO.shape[1], right_RI.shape[1])
    for e, part in slices(counts_E):
        torch.mm(left_RO[part].t(), right_RI[part], out=out_EOI[e])
    return out_EOI


def total(rows_RO: Tensor, counts_E: Tensor) -> Tensor:
    """The sum of each expert's rows: [E, O]."""
    out_EO = rows_RO.new_zeros(counts_E.shape[0], rows_RO.shape[1])
    for e, part in slices(counts_E):
        torch.sum(rows_RO[part], 0, out=out_EO[e])
    return out_EO


def ffn(
    x_TD: Tensor,
    token_R: Tensor | None,
    counts_E: Tensor,
    up_EFD: Tensor,
    gate_EFD: Tensor | None,
    down_EDF: Tensor,
    up_bias_EF: Tensor | None,
    gate_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: Activation,
) -> Tensor:
    """The experts' FFN over sorted rows: row r reads ``x[token[r]]``, or ``x[r]`` without ``token``.

    One expert is finished before the next begins, so that its hidden rows stay in cache; the buffers are shared by all.
    """
    counts = counts_E.tolist()
    R, F, most = sum(counts), up_EFD.shape[1], max(counts, default=0)
    out_RD = x_TD.new_empty(R, down_EDF.shape[1])
    up_buffer = x_TD.new_empty(most, F)
    gate_buffer = None if gate_EFD is None else x_TD.new_empty(most, F)
    start = 0
    for e, count in enumerate(counts):
        if not count:
            continue
        stop = start + count
        rows = x_TD[start:stop] if token_R is None else x_TD.index_select(0, token_R[start:stop])
        hidden = up_buffer[:count]
        _linear_into(hidden, rows, up_EFD[e], None if up_bias_EF is None else up_bias_EF[e])
        if gate_EFD is None or gate_buffer is None:
            hidden = activation.overwrite(hidden)
        else:
            gate = gate_buffer[:count]
            _linear_into(gate, rows, gate_EFD[e], None if gate_bias_EF is None else gate_bias_EF[e])
            hidden.mul_(activation.overwrite(gate))
        _linear_into(
            out_RD[start:stop], hidden, down_EDF[e], None if down_bias_ED is None else down_bias_ED[e]
        )
        start = stop
    return out_RD


def _linear_into(out: Tensor, rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    if bias_O is None:
        torch.mm(rows, weight_OI.t(), out=out)
    else:
        torch.addmm(bias_O, rows, weight_OI.t(), out=out)
