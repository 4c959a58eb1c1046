"""What experts that are off would give on average, added all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.ir.block import Block
from moeify.ir.weights import WeightRecipe


@dataclass(frozen=True)
class Compensation:
    """c_e = W_e mean(h_e), the mean output of an expert: ``-c_e`` in each expert's bias, ``sum_e c_e`` outside.

    So an expert that is off counts with its mean, and nothing changes when all are on. ``units`` gives the hidden
    units of each expert [E, W], ``mean`` the mean hidden value [F] on the user's data; both are called when a weight
    is computed. As in G-MoEfication: Lee et al., "Breaking ReLU Barrier: Generalized MoEfication for Dense Pretrained
    Models", EMNLP 2024 (aclanthology.org/2024.emnlp-main.563).
    """

    block: Block
    num_experts: int
    units: Callable[[], Tensor]
    mean: Callable[[], Tensor]
    dtype: torch.dtype

    def down_bias(self) -> WeightRecipe:
        """[E, D]."""
        shape = (self.num_experts, self.block.d_out)
        name = f"{self.block.anchor}.experts.down_bias"
        return WeightRecipe(name, shape, (self.block.down,), lambda down: -self._means(down), self.dtype)

    def output_bias(self) -> WeightRecipe:
        """[D], with the dense down bias in it."""

        def compute(down: Tensor, *bias: Tensor) -> Tensor:
            # Of the rounded values: what stands in the experts' biases must cancel.
            total = self._means(down).to(torch.promote_types(self.dtype, torch.float32)).sum(0)
            return total + bias[0] if bias else total

        bias = self.block.down_bias
        sources = (self.block.down,) if bias is None else (self.block.down, bias)
        return WeightRecipe(f"{self.block.anchor}.output_bias", (self.block.d_out,), sources, compute, self.dtype)

    def _means(self, down: Tensor) -> Tensor:
        """c_e [E, D], computed in float64 and rounded to what is stored."""
        units_EW = self.units().to(down.device)
        mean_F = self.mean().to(down.device, torch.float64)
        # One expert at a time: the whole of down in float64 could be a quarter of a large block's memory.
        return torch.stack([down[:, units].double() @ mean_F[units] for units in units_EW]).to(self.dtype)
