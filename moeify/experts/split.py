"""What all methods share that split a dense block: its hidden units become disjoint parts of equal width."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadRecipe, NotDivisible, Refused
from moeify.experts.base import ExpertPlan, Material, Method, Partition, output_bias
from moeify.experts.compensation import Compensation
from moeify.experts.cutting import check_can_be_cut
from moeify.ir.block import Block, WeightRef
from moeify.ir.profile import BlockProfile
from moeify.ir.recipe import BlockRecipe
from moeify.ir.weights import WeightRecipe, generator_for
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.router import RouterSpec

_Units = Callable[[], Tensor]


@dataclass(frozen=True)
class Parts:
    """How many parts of how many hidden units: ``experts`` routed ones, of which a token gets ``top_k``, and ``shared``
    ones that are always on.
    """

    experts: int
    top_k: int
    shared: int
    width: int


@dataclass(frozen=True)
class Split(Method):
    """The F hidden units in E + S parts of equal width: E experts and S shared ones.

    A hidden unit is a row of up and of gate, their bias entries and a column of down, and they go together. The dense
    weights are permuted and never scaled, so all experts on with weight 1 are the dense block: ``y = sum_e W_e h_e +
    b``. The down bias is added once, outside the experts.

    ``compensate`` lets an expert that is off give what it gives on average: with c_e = W_e mean(h_e), ``y = sum over
    the chosen e of (W_e h_e - c_e) + b + sum over all e of c_e``. -c_e is the expert's ``down_bias``; it cancels when
    all are on.
    """

    splits: ClassVar[bool] = True

    compensate: bool = False

    def partition(self, block: Block, parts: Parts, material: Material, generator: torch.Generator) -> Partition:
        """Which hidden units go where. ``material.profile`` is there where ``wants_profile`` says so, and fits."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def wants_profile(self, recipe: BlockRecipe) -> bool:
        return self.needs_profile or self.compensate

    def keeps_function(self, recipe: BlockRecipe, router: RouterSpec) -> bool:
        return not router.leaves_out(recipe.top_k, recipe.experts) and router.gates_are_one(recipe.top_k)

    def plan(
        self, block: Block, recipe: BlockRecipe, seed: int, dtype: torch.dtype, material: Material | None = None
    ) -> ExpertPlan:
        parts = self._parts(block, recipe)

        @functools.cache
        def find() -> Partition:
            given = self._given(block, recipe, material)
            return self.partition(block, parts, given, generator_for(seed, f"{block.anchor}.partition"))

        def routed() -> Tensor:
            return find().experts_EW

        def always() -> Tensor:
            return find().shared_S

        def mean() -> Tensor:
            profile = self._given(block, recipe, material).profile
            assert profile is not None
            return profile.mean_F

        refs = {role: ref for role, ref in block.weights.items() if role != "down_bias"}
        experts = {role: _stacked(block, role, ref, parts, routed, dtype) for role, ref in refs.items()}
        bias = output_bias(block, dtype)
        if self.compensate:
            compensation = Compensation(block, parts.experts, routed, mean, dtype)
            experts["down_bias"], bias = compensation.down_bias(), compensation.output_bias()
        return ExpertPlan(
            num_experts=parts.experts,
            d_expert=parts.width,
            weights=experts,
            shared={role: _wide(block, role, ref, parts, always, dtype) for role, ref in refs.items()}
            if parts.shared
            else {},
            output_bias=bias,
            gate=1.0,
            find_partition=find,
        )

    def _parts(self, block: Block, recipe: BlockRecipe) -> Parts:
        check_can_be_cut(block, "experts")
        if recipe.shared_gate:
            raise BadRecipe(
                f"shared-gate would switch off a part of the dense function, which {self.name} keeps whole",
                where=block.path,
                hint="leave out --shared-gate",
            )
        router = ROUTERS.parse(recipe.with_router().router)
        if router.gates_sum_to_one and recipe.top_k > 1:
            raise BadRecipe(
                f"experts of {self.name} add up with weight 1 each, and the weights of {router} sum to 1",
                where=block.path,
                hint="use --router topk, or softmax-topk{renormalise=false,scale=E} with E the number of experts",
            )
        total = recipe.experts + recipe.shared
        if block.d_ff % total:
            counts = [str(n) for n in range(2, min(block.d_ff, 64) + 1) if not block.d_ff % n]
            also = f", {recipe.experts} routed and {recipe.shared} shared" if recipe.shared else ""
            what = "--experts" if not recipe.shared else "--experts and --shared together"
            raise NotDivisible(
                f"a hidden width of {block.d_ff} does not split into {total} equal experts{also}",
                where=block.path,
                hint=f"choose {'one of ' if len(counts) > 1 else ''}{', '.join(counts)} for {what}"
                if counts
                else "use --method copy",
            )
        return Parts(recipe.experts, recipe.top_k, recipe.shared, block.d_ff // total)

    def _given(self, block: Block, recipe: BlockRecipe, material: Material | None) -> Material:
        """The material, complete. Raises Refused."""
        if material is None:
            raise Refused(f"{self.name} needs the dense weights, and there are none here", where=block.path)
        if self.wants_profile(recipe):
            check_profile(self, block, material.profile)
        return material


def check_profile(method: Method, block: Block, profile: BlockProfile | None) -> None:
    """Raises Refused for statistics that are not there, or not those of the block."""
    if profile is None:
        raise Refused(
            f"{method} needs statistics of the hidden units, and no data were given",
            where=block.path,
            hint="give data of the model's task with --data",
        )
    sizes = (profile.units, profile.inputs_ND.shape[1])
    if sizes != (block.d_ff, block.d_model):
        raise Refused(
            f"the profile is of a block of width {sizes[1]} with {sizes[0]} hidden units, and this one has "
            f"{block.d_model} and {block.d_ff}",
            where=block.path,
            hint="profile this model",
        )
    if method.needs_gradients and profile.importance_F is None:
        raise Refused(
            f"{method} needs the gradient of the loss, and the profile was made without",
            where=block.path,
            hint="profile with --gradients",
        )


def _stacked(block: Block, role: str, ref: WeightRef, parts: Parts, units: _Units, dtype: torch.dtype) -> WeightRecipe:
    """The experts' weights of one role, [E, W, D], [E, D, W] or [E, W]."""
    count, width = parts.experts, parts.width
    name = f"{block.anchor}.experts.{role}"
    if role == "down":
        d_out = ref.shape[0]

        def columns(weight: Tensor) -> Tensor:
            taken = weight.index_select(1, units().flatten().to(weight.device))
            return taken.reshape(d_out, count, width).permute(1, 0, 2)

        return WeightRecipe(name, (count, d_out, width), (ref,), columns, dtype)
    rest = ref.shape[1:]

    def rows(weight: Tensor) -> Tensor:
        return weight.index_select(0, units().flatten().to(weight.device)).reshape(count, width, *rest)

    return WeightRecipe(name, (count, width, *rest), (ref,), rows, dtype)


def _wide(block: Block, role: str, ref: WeightRef, parts: Parts, units: _Units, dtype: torch.dtype) -> WeightRecipe:
    """The shared units' weights of one role, as one dense FFN: [S*W, D], [D, S*W] or [S*W]."""
    dim = 1 if role == "down" else 0
    shape = list(ref.shape)
    shape[dim] = parts.shared * parts.width

    def take(weight: Tensor) -> Tensor:
        return weight.index_select(dim, units().to(weight.device))

    return WeightRecipe(f"{block.anchor}.shared.{role}", tuple(shape), (ref,), take, dtype)
