"""The plan of one block of a program, from its recipe."""

from __future__ import annotations

from moeify.experts import METHODS
from moeify.experts.base import ExpertPlan, Material
from moeify.experts.split import check_profile
from moeify.ir.block import Block
from moeify.ir.program import Program


def plan_block(program: Program, block: Block) -> ExpertPlan:
    """What the recipe makes of a block. Cheap: no weight is computed. Raises what the method raises.

    The plan is kept in ``program.plans``, so that a partition is looked for once; set the profile before.
    """
    recipe = program.recipe.for_block(block.path)
    key = (block.anchor, recipe, program.recipe.seed)
    if key not in program.plans:
        dtype = program.parameter(block.up.parameter).dtype
        profile = program.profile
        statistics = None if profile is None else profile.blocks.get(block.anchor)
        material = Material(program.parameter, statistics, 0 if profile is None else profile.top)
        method = METHODS.parse(recipe.method)
        program.plans[key] = method.plan(block, recipe, program.recipe.seed, dtype, material)
    return program.plans[key]


def require_profile(program: Program) -> None:
    """Raises Refused where a method needs statistics that the program has not: before work that they would end."""
    for block in program.converted():
        recipe = program.recipe.for_block(block.path)
        method = METHODS.parse(recipe.method)
        if method.wants_profile(recipe):
            check_profile(method, block, None if program.profile is None else program.profile.blocks.get(block.anchor))
