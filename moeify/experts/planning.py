"""The plan of one block of a program, from its recipe."""

from __future__ import annotations

from moeify.experts import METHODS
from moeify.experts.base import ExpertPlan
from moeify.ir.block import Block
from moeify.ir.program import Program


def plan_block(program: Program, block: Block) -> ExpertPlan:
    """What the recipe makes of a block. Cheap: no weight is computed. Raises what the method raises."""
    recipe = program.recipe.for_block(block.path)
    dtype = program.parameter(block.up.parameter).dtype
    return METHODS.parse(recipe.method).plan(block, recipe, program.recipe.seed, dtype)
