"""The partition of every method that splits a block against its definition."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.experts import METHODS
from moeify.experts.base import Material
from moeify.experts.markers import firing_markers, most
from moeify.experts.split_coactivation import exchange
from moeify.fitting.reservoir import Reservoir
from moeify.fitting.statistics import Statistics
from moeify.ir.block import Block
from moeify.ir.hidden import hidden
from moeify.ir.recipe import BlockRecipe
from tests import profiles
from tests.split_blocks import WIDTH, D, block, dense, material, partition_of


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


def test_zeros_do_not_fire():
    """Where fewer units are active than are looked for; the same as in a profile's firing rates."""
    b, weights = block(gated=False), dense()
    b.activation = "relu"
    weights["up_bias"][:20] = -100.0
    fires = firing_markers(b, material(b, weights, top=10), torch.arange(WIDTH))
    assert not fires[:20].any()
    assert 0 < fires.sum(0).mean() <= 4
