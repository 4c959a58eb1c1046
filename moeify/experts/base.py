"""What a method is: it plans the experts of one block as weight recipes and says whether the function is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moeify.ir.block import Block
from moeify.ir.profile import BlockProfile
from moeify.ir.recipe import BlockRecipe
from moeify.ir.weights import WeightRecipe
from moeify.nn.routers.router import RouterSpec, Units
from moeify.registry import render


@dataclass(frozen=True)
class Material:
    """What a method may look at beside the block's structure.

    ``read`` gives a dense parameter by name. ``profile`` holds the block's statistics, None without data; ``top`` is
    the A of its firing rates.
    """

    read: Callable[[str], Tensor]
    profile: BlockProfile | None = None
    top: int = 0


@dataclass(frozen=True)
class Partition:
    """Which hidden units of the dense block an expert has; every unit occurs once.

    ``experts_EW`` and ``shared_S`` are int64 on the CPU. The units of an expert are sorted: the one that stands for
    the expert best comes first (what "best" means is the method's own).
    """

    experts_EW: Tensor
    shared_S: Tensor

    @property
    def representative_E(self) -> Tensor:
        return self.experts_EW[:, 0]


@dataclass(frozen=True)
class ExpertPlan:
    """The experts of one block.

    ``weights`` holds recipes by role: ``up`` [E, F', D], ``gate`` [E, F', D], ``down`` [E, D, F'], ``up_bias`` [E,
    F'], ``gate_bias`` [E, F'], ``down_bias`` [E, D], named ``{anchor}.experts.{role}``. ``shared`` holds the
    always-on experts as one wide dense FFN (``up`` [S*F, D], ...), named ``{anchor}.shared.{role}``. ``output_bias``
    [D], named ``{anchor}.output_bias``, is added once, outside the experts. Consecutive groups of ``router_repeat``
    experts start from the same router row. ``gate`` is the weight of every expert when all are on; None means 1 / E.
    """

    num_experts: int
    d_expert: int
    weights: dict[str, WeightRecipe]
    shared: dict[str, WeightRecipe] = field(default_factory=dict)
    shared_gate: bool = False  # {anchor}.shared_gate.weight [1, D]; the gate is sigmoid(w x), zero at the start
    output_bias: WeightRecipe | None = None
    router_repeat: int = 1
    gate: float | None = None
    find_partition: Callable[[], Partition] | None = None  # for methods that split; may take seconds

    @functools.cached_property
    def partition(self) -> Partition | None:
        """The hidden units of each expert, None where the experts are no split. Computed once, on first use.

        Raises Refused when it needs weights or statistics that are not there.
        """
        return None if self.find_partition is None else self.find_partition()

    @property
    def units(self) -> Units | None:
        """What a router may know of a split; None where the experts are none."""
        find = self.find_partition
        return None if find is None else Units(self.num_experts, self.d_expert, lambda: find().experts_EW)


def output_bias(block: Block, dtype: torch.dtype) -> WeightRecipe | None:
    """The down bias [D] of a block whose experts are parts of it: once, outside them. None where it has none."""
    bias = block.down_bias
    if bias is None:
        return None
    return WeightRecipe(f"{block.anchor}.output_bias", bias.shape, (bias,), Tensor.clone, dtype)


@dataclass(frozen=True)
class Method:
    """A way to make experts. Options are fields; see ``moeify.registry``."""

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False  # the function is kept to float rounding when the gates sum to 1
    splits: ClassVar[bool] = False  # experts are disjoint parts of the dense block: all on with weight 1 they are it
    needs_profile: ClassVar[bool] = False  # whatever the options: statistics of the hidden units on the user's data
    needs_gradients: ClassVar[bool] = False  # and those of the loss too

    def plan(
        self, block: Block, recipe: BlockRecipe, seed: int, dtype: torch.dtype, material: Material | None = None
    ) -> ExpertPlan:
        """Cheap: no weight is computed and no partition is looked for. ``material`` None gives names and shapes only.

        Raises NotDivisible, BadRecipe or Refused, naming the block.
        """
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def wants_profile(self, recipe: BlockRecipe) -> bool:
        """Whether these options, for this recipe, need a profile."""
        return self.needs_profile

    def keeps_function(self, recipe: BlockRecipe, router: RouterSpec) -> bool:
        """Whether method and router together promise the dense function, to float rounding."""
        return self.exact and router.gates_sum_to_one

    def __str__(self) -> str:
        return render(self)
