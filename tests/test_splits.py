"""Every method that splits a block: its partition against its definition, its weights against the dense block."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import BadOption, BadRecipe, NotDivisible, Refused
from moeify.experts import METHODS
from moeify.experts.base import ExpertPlan, Material, Partition
from moeify.experts.markers import firing_markers, most
from moeify.experts.planning import plan_block, require_profile
from moeify.experts.split_coactivation import exchange
from moeify.fitting.reservoir import Reservoir
from moeify.fitting.statistics import Statistics
from moeify.ir.block import Block, WeightRef
from moeify.ir.hidden import hidden
from moeify.ir.recipe import BlockRecipe
from moeify.nn.routers import ROUTERS
from tests import profiles, programs

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


def test_markers_are_their_definition():
    b, weights = block(), dense()
    given = material(b, weights, top=3)
    found = firing_markers(b, given, torch.arange(WIDTH))
    for n, x in enumerate(given.profile.inputs_ND):
        size = hidden(b, weights.__getitem__, x[None])[0].abs().tolist()
        largest = sorted(range(WIDTH), key=lambda unit: -size[unit])[:3]
        assert found[:, n].nonzero().flatten().tolist() == sorted(largest)


def test_zeros_do_not_fire_and_the_profile_agrees():
    """A ReLU leaves fewer than 16 of 24 units active on most rows."""
    b, weights = dataclasses.replace(block(gated=False), activation="relu"), dense()
    given = material(b, weights, top=16)
    counted = Statistics(WIDTH, 16, Reservoir(64, seed=0))
    h = hidden(b, weights.__getitem__, given.profile.inputs_ND)
    counted.add(h, None)
    counted.inputs.add(given.profile.inputs_ND, 0)
    found = firing_markers(b, given, torch.arange(WIDTH))
    assert (found.sum(0) == (h > 0).sum(1).clamp(max=16)).all()
    assert (found.sum(0) < 16).any()
    torch.testing.assert_close(found.mean(1), counted.profile().firing_F)


@pytest.mark.parametrize("method", ["carve", "split-coactivation", "split-kmeans"])
def test_shared_units_are_those_that_fire_most(method):
    b, weights = block(), dense()
    rate = material(b, weights).profile.firing_F.tolist()
    expected = sorted(range(WIDTH), key=lambda unit: (-rate[unit], unit))[:6]
    assert partition_of(method, 6, 2).shared_S.tolist() == expected


def test_carve_assigns_to_the_columns_of_the_highest_rates_first():
    """One iteration, against every way to deal the units out."""
    b, weights = block(width=12), dense(12)
    given = material(b, weights)
    recipe = BlockRecipe("carve", 2, 1, shared=1)
    found = METHODS.parse("carve{iterations=1}").plan(b, recipe, 0, torch.float32, given).partition
    _, rest = most(given.profile.firing_F, 4)
    column = firing_markers(b, given, rest)
    distance = torch.stack([(column - column[e]).square().sum(1) for e in range(2)], dim=1)

    def total(half: tuple[int, ...]) -> float:
        return sum(distance[i, 0 if i in half else 1].item() for i in range(8))

    best = min(map(total, itertools.combinations(range(8), 4)))
    place = {unit: i for i, unit in enumerate(rest.tolist())}
    assert total(tuple(place[unit] for unit in found.experts_EW[0].tolist())) == best


def grouped() -> tuple[Block, dict[str, Tensor], Tensor]:
    """A block whose hidden unit n fires for tokens along axis n mod 4 alone, and the axis of each unit."""
    axis = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3)) % 4
    weights = dense()
    generator = torch.Generator().manual_seed(4)
    rows = F.one_hot(axis, D) * (1 + torch.rand(WIDTH, 1, generator=generator))
    weights["up"], weights["gate"] = rows.t().contiguous(), rows + 0.01 * torch.randn(WIDTH, D, generator=generator)
    return block(bias=False), weights, axis


@pytest.mark.parametrize("method", ["carve", "split-coactivation", "split-kmeans"])
def test_units_that_belong_together_come_together(method):
    b, weights, axis = grouped()
    # Tokens along one axis each; the 6 units of that axis are the largest.
    inputs = F.one_hot(torch.arange(64) % 4, D).float()
    profile = profiles.statistics(b, weights.__getitem__, top=6)
    object.__setattr__(profile, "inputs_ND", inputs)
    # Firing rates that start carve from one unit of every axis, whatever the random rows gave.
    rate = torch.zeros(WIDTH)
    rate[torch.tensor([(axis == a).nonzero()[0].item() for a in range(4)])] = 1
    object.__setattr__(profile, "firing_F", rate)
    given = Material(weights.__getitem__, profile, 6)
    found = METHODS.parse(method).plan(b, BlockRecipe(method, 4, 1), 0, torch.float32, given).partition
    assert all(len(set(axis[units].tolist())) == 1 for units in found.experts_EW)


def cut(together: Tensor, clusters: Tensor) -> float:
    return float(together.sum() - sum(together[units][:, units].sum() for units in clusters)) / 2


@pytest.mark.parametrize("seed", range(4))
def test_no_exchange_of_two_units_lowers_the_cut(seed):
    generator = torch.Generator().manual_seed(seed)
    markers = (torch.rand(12, 40, generator=generator) < 0.3).float()
    together = markers @ markers.t()
    clusters = torch.randperm(12, generator=generator).reshape(3, 4)
    before = cut(together, clusters)
    exchange(markers, clusters, 20)
    after = cut(together, clusters)
    assert after < before  # a random start is not the best by chance
    for (a, b), i, j in itertools.product(itertools.combinations(range(3), 2), range(4), range(4)):
        other = clusters.clone()
        other[a, i], other[b, j] = clusters[b, j], clusters[a, i]
        assert cut(together, other) >= after


def test_the_unit_that_fires_most_with_its_expert_stands_for_it():
    b, weights = block(), dense()
    given = material(b, weights)
    found = METHODS.parse("split-coactivation").plan(b, BlockRecipe("", 4, 1), 0, torch.float32, given).partition
    markers = firing_markers(b, given, torch.arange(WIDTH))
    together = (markers @ markers.t()).fill_diagonal_(0)
    for units in found.experts_EW:
        bound = [together[unit][units].sum().item() for unit in units]
        assert bound == sorted(bound, reverse=True)


def test_importance_is_shared_first_and_then_dealt_out():
    b, weights = block(), dense()
    importance = material(b, weights).profile.importance_F.tolist()
    ranked = sorted(range(WIDTH), key=lambda unit: -importance[unit])
    found = partition_of("split-importance", 6, 2)
    assert found.shared_S.tolist() == ranked[:6]
    assert found.experts_EW.tolist() == [ranked[6 + e :: 6] for e in range(6)]
    assert found.representative_E.tolist() == ranked[6:12]


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


def refusal(kind: type[Exception], text: str, b: Block | None = None, **recipe) -> str:
    with pytest.raises(kind) as error:
        METHODS.parse(text).plan(b or block(), BlockRecipe(text, **recipe), 0, torch.float32)
    return str(error.value)


def test_refuses_widths_that_do_not_divide():
    assert refusal(NotDivisible, "carve", experts=5) == (
        "a hidden width of 24 does not split into 5 equal experts\n  at: encoder.layer.3\n"
        "  hint: choose one of 2, 3, 4, 6, 8, 12, 24 for --experts"
    )
    assert refusal(NotDivisible, "split-random", experts=5, shared=2) == (
        "a hidden width of 24 does not split into 7 equal experts, 5 routed and 2 shared\n  at: encoder.layer.3\n"
        "  hint: choose one of 2, 3, 4, 6, 8, 12, 24 for --experts and --shared together"
    )


def test_refuses_a_gate_on_the_shared_experts():
    assert refusal(BadRecipe, "carve", experts=6, shared=2, shared_gate=True) == (
        "shared-gate would switch off a part of the dense function, which carve keeps whole\n  at: encoder.layer.3\n"
        "  hint: leave out --shared-gate"
    )


@pytest.mark.parametrize("router", ["softmax-topk", "noisy-topk", "hash"])
def test_refuses_weights_that_sum_to_one(router):
    assert refusal(BadRecipe, "split-random", experts=4, top_k=2, router=router) == (
        f"experts of split-random add up with weight 1 each, and the weights of {router} sum to 1\n"
        "  at: encoder.layer.3\n"
        "  hint: use --router topk, or softmax-topk{renormalise=false,scale=E} with E the number of experts"
    )


def test_one_expert_a_token_may_have_weights_that_sum_to_one():
    assert planned("split-random", block(), dense(), BlockRecipe("split-random", 4, 1, "hash")).num_experts == 4


@pytest.mark.parametrize("method", SPLITS)
def test_refuses_a_norm_over_the_hidden_width(method):
    made = programs.custom(pointwise=False)
    assert refusal(Refused, method, made.blocks[0]) == (
        "the hidden value is normalised over its whole width: it cannot be cut into experts\n"
        "  at: layers.0\n  hint: use --method copy"
    )


@pytest.mark.parametrize("method", ["carve", "split-coactivation", "split-random{compensate=true}"])
def test_refuses_to_start_without_data(method):
    made = programs.gated(method=method, experts=4)
    with pytest.raises(Refused) as error:
        require_profile(made)
    assert str(error.value) == (
        f"{method} needs statistics of the hidden units, and no data were given\n  at: layers.0\n"
        "  hint: give data of the model's task with --data"
    )


def test_refuses_importance_without_gradients():
    made = profiles.profiled(programs.gated(method="split-importance", experts=4), gradients=False)
    with pytest.raises(Refused) as error:
        require_profile(made)
    assert str(error.value) == (
        "split-importance needs the gradient of the loss, and the profile was made without\n  at: layers.0\n"
        "  hint: profile with --gradients"
    )


def test_refuses_the_profile_of_another_model():
    made, other = programs.gated(method="carve", experts=4), block()
    made.profile = profiles.profiled(programs.gated()).profile
    made.profile.blocks["layers.0"] = profiles.statistics(other, dense().__getitem__)
    with pytest.raises(Refused) as error:
        require_profile(made)
    assert str(error.value) == (
        "the profile is of a block of width 6 with 24 hidden units, and this one has 8 and 24\n  at: layers.0\n"
        "  hint: profile this model"
    )


@pytest.mark.parametrize(("shared", "wants"), [(0, False), (1, True)])
def test_kmeans_wants_data_for_shared_experts_only(shared, wants):
    assert METHODS.parse("split-kmeans").wants_profile(BlockRecipe("split-kmeans", shared=shared)) == wants


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("carve{iterations=0}", "carve.iterations is 0: it must be at least 1"),
        ("split-kmeans{iterations=0}", "split-kmeans.iterations is 0: it must be at least 1"),
        ("split-coactivation{passes=-1}", "split-coactivation.passes is -1: it must be at least 0"),
    ],
)
def test_options_out_of_range(text, message):
    with pytest.raises(BadOption) as error:
        METHODS.parse(text)
    assert str(error.value) == message


@pytest.mark.parametrize("text", [*SPLITS, "carve{compensate=false}", "split-random{compensate=true}"])
def test_the_text_of_a_method_parses_back(text):
    assert str(METHODS.parse(text)) == text


def test_zeros_do_not_fire():
    """Where fewer units are active than are looked for; the same as in a profile's firing rates."""
    b, weights = block(gated=False), dense()
    b.activation = "relu"
    weights["up_bias"][:20] = -100.0
    fires = firing_markers(b, material(b, weights, top=10), torch.arange(WIDTH))
    assert not fires[:20].any()
    assert 0 < fires.sum(0).mean() <= 4
