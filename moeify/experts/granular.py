"""Granular upcycling, virtual groups (arXiv 2410.07524), with the scale where it belongs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadRecipe, NotDivisible
from moeify.experts.base import ExpertPlan, Material, Method, output_bias
from moeify.experts.cutting import check_can_be_cut
from moeify.experts.shared import Shares, shared_experts
from moeify.ir.block import Block, WeightRef
from moeify.ir.recipe import BlockRecipe
from moeify.ir.weights import WeightRecipe


@dataclass(frozen=True)
class Granular(Method):
    """The hidden width is cut into shards; expert j*G+s is shard s of copy j.

    ``shards`` is G, 0 means top_k; ``experts`` of the recipe is their total number, E / G copies of each
    shard. A token's k experts start as k / G whole copies because the router rows of one copy start equal
    (``router_repeat``). Their gates then sum to 1 / G per shard, so the DOWN projection is multiplied by G,
    and nothing else: a scale on up or gate, inside the activation, changes the function (7 to 20 % for SwiGLU
    and GELU). The down bias is added once, outside the experts (``output_bias``).
    """

    name: ClassVar[str] = "granular"
    exact: ClassVar[bool] = True

    shards: int = 0

    def plan(
        self, block: Block, recipe: BlockRecipe, seed: int, dtype: torch.dtype, material: Material | None = None
    ) -> ExpertPlan:
        shards = self.shards or recipe.top_k
        _check(block, recipe, shards)
        shares = Shares.of(recipe, active=recipe.top_k / shards)
        weights = {
            role: _recipe(block, role, ref, recipe.experts, shards, shares.routed * shards, dtype)
            for role, ref in block.weights.items()
            if role != "down_bias"
        }
        return ExpertPlan(
            num_experts=recipe.experts,
            d_expert=block.d_ff // shards,
            weights=weights,
            # The bias stands outside routed and shared experts alike.
            shared=shared_experts(block, recipe, shares, dtype, with_down_bias=False),
            shared_gate=recipe.shared_gate,
            output_bias=output_bias(block, dtype),
            router_repeat=shards,
        )


def _check(block: Block, recipe: BlockRecipe, shards: int) -> None:
    fits = [
        n for n in range(2, recipe.top_k + 1) if not block.d_ff % n and not recipe.top_k % n and not recipe.experts % n
    ]
    if shards < 1:
        raise BadRecipe(f"granular cuts a block into {shards} shards: it must be at least 1", where=block.path)
    for count, what in ((recipe.top_k, "top-k"), (recipe.experts, "experts")):
        if count % shards:
            raise BadRecipe(
                f"{what} {count} is not a multiple of the {shards} shards of granular",
                where=block.path,
                hint=_choose(fits) if fits else f"choose a multiple of {shards} for --{what}",
            )
    if block.d_ff % shards:
        divisors = [n for n in range(2, recipe.experts + 1) if not block.d_ff % n and not recipe.experts % n]
        raise NotDivisible(
            f"a hidden width of {block.d_ff} does not split into {shards} equal shards",
            where=block.path,
            hint=_choose(fits) if fits else f"{_choose(divisors)} for --top-k" if divisors else "use --method copy",
        )
    if shards > 1:
        check_can_be_cut(block, "shards")


def _choose(numbers: list[int]) -> str:
    return f"choose {'one of ' if len(numbers) > 1 else ''}{', '.join(map(str, numbers))}"


def _recipe(
    block: Block,
    role: str,
    ref: WeightRef,
    num_experts: int,
    shards: int,
    down_scale: float,
    dtype: torch.dtype,
) -> WeightRecipe:
    copies = num_experts // shards
    shape: tuple[int, ...]
    d_expert = block.d_ff // shards
    if role == "down":
        d_out = ref.shape[0]

        def cut_columns(weight: Tensor) -> Tensor:
            cut = (weight * down_scale).reshape(d_out, shards, d_expert).permute(1, 0, 2)
            return cut.repeat(copies, 1, 1)

        shape, compute = (num_experts, d_out, d_expert), cut_columns
    else:
        rest = ref.shape[1:]

        def cut_rows(weight: Tensor) -> Tensor:
            return weight.reshape(shards, d_expert, *rest).repeat(copies, *[1] * (1 + len(rest)))

        shape, compute = (num_experts, d_expert, *rest), cut_rows
    return WeightRecipe(f"{block.anchor}.experts.{role}", shape, (ref,), compute, dtype)
