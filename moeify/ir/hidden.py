"""The hidden value of a dense block, computed from its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from moeify.ir.activations import lookup
from moeify.ir.block import Block, WeightRef


def hidden(block: Block, read: Callable[[str], Tensor], x_ND: Tensor) -> Tensor:
    """What the down projection reads, [N, F] in float32, for rows of the block's input; without dropout.

    ``read`` gives a dense parameter by name. A region (an activation without a name) keeps its own parameters.
    """
    x_ND = x_ND.float()

    def linear(weight: WeightRef, bias: WeightRef | None) -> Tensor:
        values = [ref.read(read(ref.parameter)).float() for ref in (weight, bias) if ref is not None]
        return F.linear(x_ND, *values)

    u_NF = linear(block.up, block.up_bias)
    g_NF = None if block.gate is None else linear(block.gate, block.gate_bias)
    if block.region is not None:
        region = block.region
        if any(tensor.is_floating_point() and tensor.element_size() != 4 for tensor in region.parameters()):
            region = copy.deepcopy(region).float()
        return region(u_NF).float() if g_NF is None else region(u_NF, g_NF).float()
    act = lookup(block.activation)
    return act(u_NF) if g_NF is None else act(g_NF) * u_NF
