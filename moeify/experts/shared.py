"""Shared experts: always on, one wide dense FFN, and the shares that keep the function.

Routed experts alone give the dense output y when the gates sum to 1: a token goes through m full-width FFNs (m
= top_k, or top_k / G for shards) whose gates add up to one y. With S shared copies beside them each of the S +
m active FFNs carries the same share of y: the routed part m / (S + m), the shared part S / (S + m), that is 1
/ (S + m) for each shared copy. The shares are folded into the DOWN projections and their biases. A shared part
behind a gate sigmoid(w x) with w = 0 is halved at the start, so it is doubled here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.ir.block import Block, WeightRef
from moeify.ir.recipe import BlockRecipe
from moeify.ir.weights import WeightRecipe


@dataclass(frozen=True)
class Shares:
    """What the down projections are multiplied by: of the routed experts, and of each shared copy."""

    routed: float
    each_shared: float

    @classmethod
    def of(cls, recipe: BlockRecipe, active: float) -> Shares:
        """``active`` is the number of full-width routed FFNs that a token goes through."""
        if not recipe.shared:
            return cls(1.0, 0.0)
        total = recipe.shared + active
        return cls(active / total, (2.0 if recipe.shared_gate else 1.0) / total)


def shared_experts(
    block: Block, recipe: BlockRecipe, shares: Shares, dtype: torch.dtype, *, with_down_bias: bool = True
) -> dict[str, WeightRecipe]:
    """S copies of the block as one dense FFN of hidden width S * F: up [S*F, D], down [D, S*F], down_bias [D]."""
    if not recipe.shared:
        return {}
    return {
        role: _recipe(block, role, ref, recipe.shared, shares.each_shared, dtype)
        for role, ref in block.weights.items()
        if with_down_bias or role != "down_bias"
    }


def _recipe(block: Block, role: str, ref: WeightRef, copies: int, scale: float, dtype: torch.dtype) -> WeightRecipe:
    name = f"{block.anchor}.shared.{role}"
    if role == "down_bias":  # added once for all copies
        return WeightRecipe(name, ref.shape, (ref,), lambda bias: bias * (scale * copies), dtype)
    if role == "down":
        d_out, d_ff = ref.shape

        def widen(weight: Tensor) -> Tensor:
            return (weight * scale).repeat(1, copies)

        return WeightRecipe(name, (d_out, copies * d_ff), (ref,), widen, dtype)

    def tile(weight: Tensor) -> Tensor:
        return weight.repeat(copies, *[1] * (weight.dim() - 1))

    return WeightRecipe(name, (copies * ref.shape[0], *ref.shape[1:]), (ref,), tile, dtype)
