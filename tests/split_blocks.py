"""A small dense block, random weights and a profile, for tests of the methods that split."""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.experts import METHODS
from moeify.experts.base import ExpertPlan, Material, Partition
from moeify.ir.block import Block, WeightRef
from moeify.ir.recipe import BlockRecipe
from tests import profiles

D, WIDTH = 6, 24
SPLITS = ["split-random", "split-kmeans", "split-coactivation", "split-importance", "split-energy", "carve"]


def block(*, gated: bool = True, bias: bool = True, width: int = WIDTH) -> Block:
    """A dense block; up is stored transposed, as GPT-2 does."""
    return Block(
        path="encoder.layer.3",
        anchor="encoder.layer.3",
        calls=[],
        up=WeightRef("up", (width, D), (("t",),)),
        gate=WeightRef("gate", (width, D)) if gated else None,
        down=WeightRef("down", (D, width)),
        up_bias=WeightRef("up_bias", (width,)) if bias else None,
        gate_bias=WeightRef("gate_bias", (width,)) if gated and bias else None,
        down_bias=WeightRef("down_bias", (D,)) if bias else None,
        activation="silu",
    )


def dense(width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (D, width), "gate": (width, D), "down": (D, width), "up_bias": (width,), "gate_bias": (width,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in {**shapes, "down_bias": (D,)}.items()}


def material(b: Block, weights: dict[str, Tensor], top: int = 5) -> Material:
    return Material(weights.__getitem__, profiles.statistics(b, weights.__getitem__, top=top), top)


def planned(text: str, b: Block, weights: dict[str, Tensor], recipe: BlockRecipe, seed: int = 0) -> ExpertPlan:
    return METHODS.parse(text).plan(b, recipe, seed, torch.float32, material(b, weights))


def partition_of(text: str, experts: int, shared: int, seed: int = 0, width: int = WIDTH) -> Partition:
    b, weights = block(width=width), dense(width)
    found = planned(text, b, weights, BlockRecipe(text, experts, 1, shared=shared), seed).partition
    assert found is not None
    return found
