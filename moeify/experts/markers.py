"""Which hidden units fire: among the largest of a token (CMoE, arXiv 2502.04416)."""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.experts.base import Material
from moeify.ir.block import Block
from moeify.ir.hidden import hidden

_ROWS = 512  # of hidden values at a time


def firing_markers(block: Block, material: Material, units_M: Tensor) -> Tensor:
    """``a_n(x)`` for some hidden units over the profile's sample of rows x: [M, N], float32, 1 where ``|h_n(x)|`` is
    above zero and among the ``material.top`` largest of all hidden units, 0 elsewhere.
    """
    assert material.profile is not None
    inputs_ND = material.profile.inputs_ND
    markers_MN = torch.empty(len(units_M), len(inputs_ND))
    for start in range(0, len(inputs_ND), _ROWS):
        rows = slice(start, start + _ROWS)
        size_RF = hidden(block, material.read, inputs_ND[rows]).abs()
        largest = size_RF.topk(min(material.top, block.d_ff), dim=1)
        # Zeros do not fire, where fewer units are active.
        fires_RF = torch.zeros_like(size_RF).scatter_(1, largest.indices, (largest.values > 0).float())
        markers_MN[:, rows] = fires_RF[:, units_M].t()
    return markers_MN


def most(values_F: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``(units, the others)``: the ``count`` hidden units of the largest values, largest first, and the rest likewise;
    the lower number first among equals.
    """
    order = torch.sort(values_F, descending=True, stable=True).indices.cpu()
    return order[:count], order[count:]
