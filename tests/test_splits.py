"""Every method that splits a block: what all keep, and its weights against the dense block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import Refused
from moeify.experts import METHODS
from moeify.experts.base import ExpertPlan
from moeify.experts.planning import plan_block
from moeify.ir.block import Block
from moeify.ir.recipe import BlockRecipe
from moeify.nn.routers import ROUTERS
from tests import profiles, programs
from tests.split_blocks import SPLITS, WIDTH, D, block, dense, material, partition_of, planned


def everything_on(plan: ExpertPlan, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The mixture with every expert on, written out."""
    value = {name: r.materialise(weights.__getitem__) for name, r in plan.weights.items()}
    y = sum(ffn(x, {role: v[e] for role, v in value.items()}) for e in range(plan.num_experts))
    if plan.shared:
        y = y + ffn(x, {role: r.materialise(weights.__getitem__) for role, r in plan.shared.items()})
    return y if plan.output_bias is None else y + plan.output_bias.materialise(weights.__getitem__)


def ffn(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    up = F.linear(x, w["up"], w.get("up_bias"))
    h = F.silu(F.linear(x, w["gate"], w.get("gate_bias"))) * up if "gate" in w else F.silu(up)
    return F.linear(h, w["down"], w.get("down_bias"))


def canonical(b: Block, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {role: ref.read(weights[ref.parameter]) for role, ref in b.weights.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("experts", "shared"), [(4, 0), (6, 2), (1, 0), (24, 0)])
@pytest.mark.parametrize("method", [*SPLITS, "split-random{compensate=true}", "carve{compensate=false}"])
def test_all_experts_on_are_the_dense_block(method, experts, shared, gated, bias):
    b, weights = block(gated=gated, bias=bias), dense()
    plan = planned(method, b, weights, BlockRecipe(method, experts, 1, shared=shared))
    assert plan.gate == 1.0
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    y, expected = everything_on(plan, weights, x), ffn(x, canonical(b, weights))
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("method", SPLITS)
def test_every_unit_goes_to_one_part(method, shared):
    found = partition_of(method, 6, shared)
    assert found.experts_EW.shape == (6, WIDTH // (6 + shared))
    assert found.shared_S.shape == (shared * WIDTH // (6 + shared),)
    assert sorted([*found.experts_EW.flatten().tolist(), *found.shared_S.tolist()]) == list(range(WIDTH))


@pytest.mark.parametrize("method", SPLITS)
def test_weights_are_those_of_the_units_bit_for_bit(method):
    b, weights = block(), dense()
    plan = planned(method, b, weights, BlockRecipe(method, 6, 1, shared=2))
    found, w = plan.partition, canonical(b, weights)
    value = {role: r.materialise(weights.__getitem__) for role, r in plan.weights.items()}
    shared = {role: r.materialise(weights.__getitem__) for role, r in plan.shared.items()}
    assert set(shared) == {"up", "gate", "down", "up_bias", "gate_bias"}
    for e, units in enumerate(found.experts_EW):
        for role in ("up", "gate", "up_bias", "gate_bias"):
            assert torch.equal(value[role][e], w[role][units])
        assert torch.equal(value["down"][e], w["down"][:, units])
    assert torch.equal(shared["gate"], w["gate"][found.shared_S])
    assert torch.equal(shared["down"], w["down"][:, found.shared_S])


@pytest.mark.parametrize("method", SPLITS)
def test_the_partition_depends_on_the_seed_and_nothing_else(method):
    first, again = partition_of(method, 4, 2), partition_of(method, 4, 2)
    assert torch.equal(first.experts_EW, again.experts_EW)
    assert torch.equal(first.shared_S, again.shared_S)


def test_another_seed_is_another_random_split():
    first, other = partition_of("split-random", 4, 0), partition_of("split-random", 4, 0, seed=1)
    assert not torch.equal(first.experts_EW, other.experts_EW)


def test_an_expert_that_is_off_counts_with_its_mean():
    b, weights = block(), dense()
    given = material(b, weights)
    plan = METHODS.parse("carve").plan(b, BlockRecipe("carve", 4, 1, shared=2), 0, torch.float32, given)
    value = {role: r.materialise(weights.__getitem__) for role, r in plan.weights.items()}
    outside = plan.output_bias.materialise(weights.__getitem__)
    # With all four off, what is left is the mean output of all four and the bias of the block.
    mean = sum(weights["down"][:, units] @ given.profile.mean_F[units] for units in plan.partition.experts_EW)
    torch.testing.assert_close(outside, mean + weights["down_bias"])
    for e, units in enumerate(plan.partition.experts_EW):
        torch.testing.assert_close(value["down_bias"][e], -(weights["down"][:, units] @ given.profile.mean_F[units]))


def test_compensation_cancels_in_half_precision():
    b, weights = block(), {name: value.bfloat16() for name, value in dense().items()}
    plan = METHODS.parse("carve").plan(b, BlockRecipe("carve", 8, 1), 0, torch.bfloat16, material(b, dense()))
    experts = plan.weights["down_bias"].materialise(weights.__getitem__)
    outside = plan.output_bias.materialise(weights.__getitem__)
    left = outside.float() + experts.float().sum(0) - weights["down_bias"].float()
    # Only the last rounding of the sum outside is left, half a unit in its last place.
    assert (left.abs() <= outside.float().abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-6).all()


@pytest.mark.parametrize("method", SPLITS)
def test_structure_is_known_without_weights_or_data(method):
    recipe = BlockRecipe(method, 6, 2, shared=2)
    bare = METHODS.parse(method).plan(block(), recipe, 0, torch.float32)
    full = planned(method, block(), dense(), recipe)
    for part in ("weights", "shared"):
        assert {r.name: r.shape for r in getattr(bare, part).values()} == {
            r.name: r.shape for r in getattr(full, part).values()
        }
    assert (bare.num_experts, bare.d_expert, bare.gate) == (6, 3, 1.0)
    with pytest.raises(Refused, match=f"^{method} needs the dense weights, and there are none here"):
        _ = bare.partition


def test_the_partition_is_found_once():
    made = profiles.profiled(programs.gated(method="carve", experts=4))
    plan = plan_block(made, made.blocks[0])
    assert plan_block(made, made.blocks[0]) is plan
    assert made.clone().plans == made.plans
    assert plan.partition is plan.partition


@pytest.mark.parametrize("name", list(METHODS))
def test_the_router_of_a_recipe_goes_with_its_method(name):
    splits = METHODS.cls(name).splits
    assert splits == (name in SPLITS)
    assert BlockRecipe(name).with_router().router == ("topk" if splits else "softmax-topk")
    assert BlockRecipe(name, router="hash").with_router().router == "hash"


@pytest.mark.parametrize(
    ("method", "router", "top_k", "keeps"),
    [
        ("carve", "topk", 8, True),
        ("carve", "topk", 7, False),
        ("carve", "softmax-topk{renormalise=false,scale=8}", 8, False),
        ("copy", "softmax-topk", 2, True),
        ("copy", "topk", 1, False),
    ],
)
def test_what_keeps_the_function(method, router, top_k, keeps):
    recipe = BlockRecipe(method, 8, top_k)
    assert METHODS.parse(method).keeps_function(recipe, ROUTERS.parse(router)) == keeps


@pytest.mark.parametrize(("shared", "wants"), [(0, False), (1, True)])
def test_kmeans_wants_data_for_shared_experts_only(shared, wants):
    assert METHODS.parse("split-kmeans").wants_profile(BlockRecipe("split-kmeans", shared=shared)) == wants


@pytest.mark.parametrize("text", [*SPLITS, "carve{compensate=false}", "split-random{compensate=true}"])
def test_the_text_of_a_method_parses_back(text):
    assert str(METHODS.parse(text)) == text
