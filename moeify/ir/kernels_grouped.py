"""The same products by ``torch.nn.functional.grouped_mm``: one kernel for all experts, and no wait for the device.

On CUDA the grouped GEMM takes bfloat16, compute capability 8.0 or newer, and widths whose bytes are a multiple of 16.
In eager CPU the same call also takes float32, which is how these functions are tested where there is no GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.ir.activations import Activation

_ALIGNMENT = 16  # bytes


def fits(rows_RI: Tensor, *weights: Tensor | None) -> bool:
    """Whether the grouped GEMM takes these operands on their device. False on the CPU: the loop is faster there."""
    return (
        rows_RI.device.type == "cuda"
        and rows_RI.shape[0] > 0
        and torch.cuda.get_device_capability(rows_RI.device) >= (8, 0)
        and aligned(rows_RI, *weights)
    )


def aligned(rows_RI: Tensor, *weights: Tensor | None) -> bool:
    """Whether all are bfloat16 with widths that are a multiple of 16 bytes."""
    tensors = [rows_RI, *(weight for weight in weights if weight is not None)]
    sizes = {size for tensor in tensors for size in tensor.shape[1:]}
    return all(tensor.dtype == torch.bfloat16 for tensor in tensors) and all(
        size and size * torch.bfloat16.itemsize % _ALIGNMENT == 0 for size in sizes
    )


def offsets(counts_E: Tensor) -> Tensor:
    """Where each expert's rows end, int32."""
    return counts_E.cumsum(0, dtype=torch.int32)


def expert_of_row(counts_E: Tensor, rows: int) -> Tensor:
    """The expert of each sorted row. Giving the number of rows spares the wait for the device."""
    experts_E = torch.arange(counts_E.shape[0], device=counts_E.device)
    return experts_E.repeat_interleave(counts_E, output_size=rows)


def expert_or_none_of_row(counts_E: Tensor, rows: int) -> Tensor:
    """The same where the last rows may belong to no expert: the number E there."""
    rest = (rows - counts_E.sum()).unsqueeze(0)
    return expert_of_row(torch.cat([counts_E, rest]), rows)


def _zero_rest(out_RO: Tensor, counts_E: Tensor) -> Tensor:
    """The result with zeros in the rows of no expert, which the kernel leaves as they were in memory."""
    place_R = torch.arange(out_RO.shape[0], device=out_RO.device)
    return out_RO.masked_fill_((place_R >= counts_E.sum()).unsqueeze(1), 0)


def linear(rows_RI: Tensor, counts_E: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
    """See ``kernels.linear``."""
    out_RO = F.grouped_mm(rows_RI.contiguous(), _plain(weight_EOI).transpose(1, 2), offs=offsets(counts_E))
    if bias_EO is not None:
        expert_R = expert_or_none_of_row(counts_E, rows_RI.shape[0]).clamp_(max=bias_EO.shape[0] - 1)
        out_RO.add_(bias_EO.index_select(0, expert_R))
    return _zero_rest(out_RO, counts_E)


def outer(left_RO: Tensor, right_RI: Tensor, counts_E: Tensor) -> Tensor:
    """See ``kernels.outer``."""
    out_EOI = F.grouped_mm(left_RO.contiguous().t(), right_RI.contiguous(), offs=offsets(counts_E))
    # The product of an empty group is not documented to be zero.
    return out_EOI.masked_fill_((counts_E == 0)[:, None, None], 0)


def total(rows_RO: Tensor, counts_E: Tensor) -> Tensor:
    """See ``kernels.total``. Sums in float32 at least: the additions are atomic, one row at a time."""
    wide = torch.promote_types(rows_RO.dtype, torch.float32)
    out = torch.zeros(counts_E.shape[0] + 1, rows_RO.shape[1], dtype=wide, device=rows_RO.device)
    out.index_add_(0, expert_or_none_of_row(counts_E, rows_RO.shape[0]), rows_RO.to(wide))
    return out[:-1].to(rows_RO.dtype)


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
    """See ``kernels.ffn``."""
    rows_RD = x_TD if token_R is None else x_TD.index_select(0, token_R)
    hidden_RF = linear(rows_RD, counts_E, up_EFD, up_bias_EF)
    if gate_EFD is None:
        hidden_RF = activation.overwrite(hidden_RF)
    else:
        hidden_RF.mul_(activation.overwrite(linear(rows_RD, counts_E, gate_EFD, gate_bias_EF)))
    return linear(hidden_RF, counts_E, down_EDF, down_bias_ED)


def _plain(weight_EOI: Tensor) -> Tensor:
    """The weight in a layout the kernel takes: one matrix axis of stride 1, the other packed."""
    if weight_EOI.is_contiguous() or weight_EOI.transpose(1, 2).is_contiguous():
        return weight_EOI
    return weight_EOI.contiguous()
