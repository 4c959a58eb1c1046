"""Sparse upcycling: every expert is the dense FFN (arXiv 2212.05055)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.experts.base import ExpertPlan, Material, Method
from moeify.experts.shared import Shares, shared_experts
from moeify.ir.block import Block, WeightRef
from moeify.ir.recipe import BlockRecipe
from moeify.ir.weights import WeightRecipe


@dataclass(frozen=True)
class Copy(Method):
    """Every expert is a copy of the dense FFN.

    A region without a name (an activation with parameters of its own: PReLU, a norm over the hidden width) is
    not copied: its parameters stay one tensor that all experts read and train together.
    """

    name: ClassVar[str] = "copy"
    exact: ClassVar[bool] = True

    def plan(
        self, block: Block, recipe: BlockRecipe, seed: int, dtype: torch.dtype, material: Material | None = None
    ) -> ExpertPlan:
        shares = Shares.of(recipe, active=recipe.top_k)
        return ExpertPlan(
            num_experts=recipe.experts,
            d_expert=block.d_ff,
            weights={
                role: self.recipe(block, role, ref, recipe.experts, shares, seed, dtype)
                for role, ref in block.weights.items()
            },
            shared=shared_experts(block, recipe, shares, dtype),
            shared_gate=recipe.shared_gate,
        )

    def recipe(
        self,
        block: Block,
        role: str,
        ref: WeightRef,
        num_experts: int,
        shares: Shares,
        seed: int,
        dtype: torch.dtype,
    ) -> WeightRecipe:
        """How the stacked weight of one role is made."""
        scale = shares.routed if role in ("down", "down_bias") else 1.0

        def compute(weight: Tensor) -> Tensor:
            experts = stack(weight, num_experts, scale)
            self.alter(experts, block, role, scale, seed)
            return experts

        return WeightRecipe(expert_name(block, role), (num_experts, *ref.shape), (ref,), compute, dtype)

    def alter(self, experts: Tensor, block: Block, role: str, scale: float, seed: int) -> None:
        """Change the copies [E, ...] of one role, ``scale`` times the dense weight each, in place.

        Methods that start from copies override this and nothing else.
        """


def expert_name(block: Block, role: str) -> str:
    """The stacked weight's name in both forms of the result."""
    return f"{block.anchor}.experts.{role}"


def stack(weight: Tensor, num_experts: int, scale: float = 1.0) -> Tensor:
    """``num_experts`` copies [E, ...] of ``scale * weight``, in memory of their own."""
    scaled = weight if scale == 1.0 else weight * scale
    # Without the clone a stack of one expert would be the dense weight itself.
    return scaled.expand(num_experts, *weight.shape).clone(memory_format=torch.contiguous_format)
