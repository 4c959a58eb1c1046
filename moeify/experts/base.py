"""What a method is: it plans the experts of one block as weight recipes and says whether the function is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from moeify.ir.block import Block
from moeify.ir.recipe import BlockRecipe
from moeify.ir.weights import WeightRecipe
from moeify.registry import render


@dataclass(frozen=True)
class ExpertPlan:
    """The experts of one block.

    ``weights`` holds recipes by role: ``up`` [E, F', D], ``gate`` [E, F', D], ``down`` [E, D, F'], ``up_bias`` [E,
    F'], ``gate_bias`` [E, F'], ``down_bias`` [E, D], named ``{anchor}.experts.{role}``. ``shared`` holds the
    always-on experts as one wide dense FFN (``up`` [S*F, D], ...), named ``{anchor}.shared.{role}``. ``output_bias``
    [D], named ``{anchor}.output_bias``, is added once, outside the experts. Consecutive groups of ``router_repeat``
    experts start from the same router row.
    """

    num_experts: int
    d_expert: int
    weights: dict[str, WeightRecipe]
    shared: dict[str, WeightRecipe] = field(default_factory=dict)
    shared_gate: bool = False  # {anchor}.shared_gate.weight [1, D]; the gate is sigmoid(w x), zero at the start
    output_bias: WeightRecipe | None = None
    router_repeat: int = 1


@dataclass(frozen=True)
class Method:
    """A way to make experts. Options are fields; see ``moeify.registry``."""

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False  # the function is kept to float rounding when the gates sum to 1

    def plan(self, block: Block, recipe: BlockRecipe, seed: int, dtype: torch.dtype) -> ExpertPlan:
        """Raises NotDivisible or Refused, naming the block."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def __str__(self) -> str:
        return render(self)
