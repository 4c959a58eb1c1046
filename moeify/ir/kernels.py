"""Grouped products over rows sorted by expert: one GEMM per expert that has rows, no token loop, no mask.

Rows after those that are counted belong to no expert: nothing is computed for them, and their results are zero.

These run on every device. Reading ``counts_E`` as a list waits for the device once per call; ``kernels_grouped`` holds
the path that does not. Letters: R rows, I and O inner and outer width, the rest as in ``ops``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moeify.ir.activations import Activation

# An expert has few rows for its weight. With these types on the CPU ``weight @ rows.T`` beats ``rows @ weight.T`` (by a
# quarter at 128 rows): the GEMM repacks its right operand, and that is then the small one. For bfloat16 the same order
# is several times slower.
_WEIGHT_FIRST = (torch.float32, torch.float64)

# The rows are then the columns of the product, and a GEMM whose columns do not fill its register tile loses a tenth.
_TILE = 8


def slices(counts_E: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            yield expert, slice(start, start + count)
            start += count


def _zero_rest(out_RO: Tensor, counts_E: Tensor) -> Tensor:
    """The result with zeros in the rows of no expert."""
    out_RO[int(counts_E.sum()) :].zero_()
    return out_RO


def _tiled(part: slice, total: int) -> slice:
    """The rows of an expert and enough of its neighbours' to fill whole tiles; the products of those are dropped."""
    size = -(-(part.stop - part.start) // _TILE) * _TILE
    if part.stop - part.start < 2 * _TILE or size > total:
        return part
    stop = min(part.start + size, total)
    return slice(stop - size, stop)


def linear(rows_RI: Tensor, counts_E: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    """``rows[r] @ weight[e].T + bias[e]`` for the expert e of row r."""
    O = weight_EOI.shape[1]  # noqa: E741
    out_RO = rows_RI.new_empty(rows_RI.shape[0], O)
    buffer = _buffer(rows_RI, counts_E, O) if _weight_first(rows_RI) else None
    for e, part in slices(counts_E):
        if buffer is None:
            _linear_into(out_RO[part], rows_RI[part], weight_EOI[e], _of(bias_EO, e))
        else:
            wide = _tiled(part, rows_RI.shape[0])
            product = _linear(rows_RI[wide], weight_EOI[e], _of(bias_EO, e), buffer)
            out_RO[part].copy_(product[part.start - wide.start : part.stop - wide.start])
    return _zero_rest(out_RO, counts_E)


def outer(left_RO: Tensor, right_RI: Tensor, counts_E: Tensor) -> Tensor:
    """``left[rows of e].T @ right[rows of e]`` for every expert: [E, O, I], zero for an expert without rows."""
    out_EOI = left_RO.new_empty(counts_E.shape[0], left_RO.shape[1], right_RI.shape[1])
    parts = dict(slices(counts_E))
    for e in range(counts_E.shape[0]):
        if e in parts:
            torch.mm(left_RO[parts[e]].t(), right_RI[parts[e]], out=out_EOI[e])
        else:
            out_EOI[e].zero_()
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

    One expert is finished before the next begins, so that its hidden rows stay in cache; all share the buffers.
    """
    R = x_TD.shape[0] if token_R is None else token_R.shape[0]
    D, F = down_EDF.shape[1:]
    out_RD = x_TD.new_empty(R, D)
    up_buffer = _buffer(x_TD, counts_E, F)
    gate_buffer = _buffer(x_TD, counts_E, F) if gate_EFD is not None else None
    out_buffer = _buffer(x_TD, counts_E, D) if _weight_first(x_TD) else None
    for e, part in slices(counts_E):
        wide = _tiled(part, R) if _weight_first(x_TD) else part
        rows = x_TD[wide] if token_R is None else x_TD.index_select(0, token_R[wide])
        hidden = _linear(rows, up_EFD[e], _of(up_bias_EF, e), up_buffer)
        if gate_EFD is None or gate_buffer is None:
            hidden = activation.overwrite(hidden)
        else:
            gate = _linear(rows, gate_EFD[e], _of(gate_bias_EF, e), gate_buffer)
            hidden = hidden.mul_(activation.overwrite(gate))
        if out_buffer is None:
            _linear_into(out_RD[part], hidden, down_EDF[e], _of(down_bias_ED, e))
        else:
            product = _linear(hidden, down_EDF[e], _of(down_bias_ED, e), out_buffer)
            out_RD[part].copy_(product[part.start - wide.start : part.stop - wide.start])
    return _zero_rest(out_RD, counts_E)


def _weight_first(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype in _WEIGHT_FIRST


def _buffer(rows: Tensor, counts_E: Tensor, width: int) -> Tensor:
    """Memory for the widest product of one expert."""
    return rows.new_empty((max(counts_E.tolist(), default=0) + _TILE) * width)


def _linear(rows_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, buffer: Tensor) -> Tensor:
    """[R, O] in the buffer's memory; transposed there when the weight goes first."""
    R, O = rows_RI.shape[0], weight_OI.shape[0]  # noqa: E741
    if not _weight_first(rows_RI):
        return _linear_into(buffer[: R * O].view(R, O), rows_RI, weight_OI, bias_O)
    out_OR = buffer[: R * O].view(O, R)
    if bias_O is None:
        return torch.mm(weight_OI, rows_RI.t(), out=out_OR).t()
    return torch.addmm(bias_O.unsqueeze(1), weight_OI, rows_RI.t(), out=out_OR).t()


def _linear_into(out_RO: Tensor, rows_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Write the product to ``out``."""
    if bias_O is None:
        return torch.mm(rows_RI, weight_OI.t(), out=out_RO)
    return torch.addmm(bias_O, rows_RI, weight_OI.t(), out=out_RO)


def _of(bias_EO: Tensor | None, expert: int) -> Tensor | None:
    return None if bias_EO is None else bias_EO[expert]
