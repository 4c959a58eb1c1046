"""Weights in the order in which the register tile reads them: panels of columns, each contiguous from first to last.

A panel is ``columns`` outputs of one matrix, [K, columns] for an inner width of K: the inner loop reads one row of it
for each step. Outputs beyond the last are zeros, so that no kernel has a special case for a narrow panel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tvm import tirx

from moeify.errors import Refused

STORED = (torch.float32, torch.float16, torch.bfloat16)
# Passed as their bits: DLPack and numpy have no agreed bfloat16, and kernels shift them anyway.
_BITS = {torch.bfloat16: torch.uint16}


def count(outputs: int, columns: int) -> int:
    """How many panels."""
    return -(-outputs // columns)


def panels(weight: Tensor, columns: int) -> Tensor:
    """``[..., N, K]`` as ``[..., ceil(N / columns), K, columns]``."""
    *stack, N, K = weight.shape
    full = torch.nn.functional.pad(weight, (0, 0, 0, -N % columns))
    return full.reshape(*stack, count(N, columns), columns, K).transpose(-1, -2).contiguous()


def gated_panels(gate: Tensor, up: Tensor, columns: int) -> Tensor:
    """Two matrices in one: the left half of each panel is of ``gate`` and the right half of the same rows of ``up``.

    One tile then has both values of a hidden unit in registers, side by side.
    """
    return torch.cat((panels(gate, columns // 2), panels(up, columns // 2)), -1)


def padded(bias: Tensor, columns: int) -> Tensor:
    """``[..., N]`` with zeros up to whole panels."""
    return torch.nn.functional.pad(bias, (0, -bias.shape[-1] % columns))


def gated_biases(gate: Tensor, up: Tensor, columns: int) -> Tensor:
    """``[..., N]`` twice as the biases of ``gated_panels``: ``[..., ceil(N / (columns / 2)) * columns]``."""
    half = columns // 2
    parts = [padded(bias, half).reshape(*bias.shape[:-1], count(bias.shape[-1], half), half) for bias in (gate, up)]
    return torch.cat(parts, -1).flatten(-2)


def stored(value: Tensor, dtype: torch.dtype, name: str = "") -> Tensor:
    """Rounded to ``dtype``; bfloat16 as its bits, which is how it is passed to kernels.

    Raises Refused, naming the weight, where a number is larger than ``dtype`` holds.
    """
    rounded = value.to(dtype)
    if dtype == torch.float16 and bool((rounded.isinf() & value.isfinite()).any()):
        largest, limit = float(value.abs().max()), torch.finfo(dtype).max
        raise Refused(
            f"a weight of {largest:.6g} is beyond the {limit:.6g} of float16",
            where=name or None,
            hint="bfloat16 has the range of float32",
        )
    return rounded.view(_BITS[dtype]) if dtype in _BITS else rounded


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what ``stored`` gives."""
    return _BITS.get(dtype, dtype)


def widened(value: Any, dtype: torch.dtype) -> Any:
    """A stored element as float32, in a kernel."""
    if dtype in _BITS:  # the upper half of the float32
        return tirx.reinterpret("float32", tirx.Cast("uint32", value) << tirx.const(16, "uint32"))
    return value if dtype == torch.float32 else tirx.Cast("float32", value)
