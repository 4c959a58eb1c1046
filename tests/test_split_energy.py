"""``split-energy``: its energies, its start, every step and what it ends with, against their definitions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import BadOption, Refused
from moeify.experts import METHODS
from moeify.experts.base import Material
from moeify.experts.split import Parts
from moeify.experts.split_energy import ascend, choose, deal, unit_energy
from moeify.ir.hidden import hidden
from moeify.ir.recipe import BlockRecipe
from tests import profiles
from tests.split_blocks import WIDTH, block, dense, material


def random_energy(tokens: int, units: int, seed: int) -> Tensor:
    """Of units that hang together, since they read four features of a token; every row sums to 1."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, units, generator=generator)
    return F.normalize(h.relu() ** 4, p=1)


TINY = [Parts(2, 1, 2, 2), Parts(3, 1, 1, 2), Parts(4, 2, 0, 2)]  # of 8 units


def captured(energy_NF: Tensor, part_F: Tensor, parts: Parts) -> float:
    """What is maximised, in float64, by trying every choice of experts for every token."""
    chosen = [[*experts, parts.experts] for experts in itertools.combinations(range(parts.experts), parts.top_k)]
    on_CF = torch.stack([torch.isin(part_F, torch.tensor(choice)) for choice in chosen]).double()
    return float((energy_NF.double() @ on_CF.t()).amax(1).sum())


def arrangements(slots: list[int]) -> Iterator[list[int]]:
    if not slots:
        yield []
    for first in sorted(set(slots)):
        left = slots.copy()
        left.remove(first)
        yield from ([first, *rest] for rest in arrangements(left))


def partitions(parts: Parts) -> Iterator[Tensor]:
    """Every way to deal the units out."""
    size = [parts.width] * parts.experts + [parts.shared * parts.width]
    return map(torch.tensor, arrangements([part for part, count in enumerate(size) for _ in range(count)]))


def test_energy_is_its_definition():
    b, weights = block(), dense()
    given = material(b, weights)
    h = hidden(b, weights.__getitem__, given.profile.inputs_ND).double()
    error = torch.empty(len(h), WIDTH, dtype=torch.float64)
    for t, n in itertools.product(range(len(h)), range(WIDTH)):
        # What the output loses when this unit counts with its mean.
        lost = (h[t, n] - given.profile.mean_F[n]) * weights["down"][:, n]
        error[t, n] = (lost**2).sum()
    expected = error / error.sum(1, keepdim=True)
    assert (unit_energy(b, given) - expected).abs().max() <= 1e-5 * expected.max()


def test_a_token_with_every_unit_at_its_mean_has_no_energy():
    b, weights = block(bias=False), dense()
    profile = profiles.statistics(b, weights.__getitem__)
    object.__setattr__(profile, "mean_F", torch.zeros(WIDTH))
    profile.inputs_ND[3] = 0  # silu(0) 0 = 0
    energy = unit_energy(b, Material(weights.__getitem__, profile, 5))
    assert (energy[3] == 0).all()
    assert energy.sum(1).tolist() == pytest.approx([1.0] * 3 + [0.0] + [1.0] * 60)


def test_it_starts_with_the_largest_mean_energies_shared_and_the_others_dealt_out():
    energy = random_energy(40, 12, seed=0)
    parts = Parts(experts=2, top_k=1, shared=1, width=4)
    by_rank = sorted(range(12), key=lambda unit: -float(energy[:, unit].mean()))
    part = deal(energy, parts).tolist()
    assert [part[unit] for unit in by_rank] == [2, 2, 2, 2, 0, 1, 0, 1, 0, 1, 0, 1]


def test_what_is_captured_is_its_definition():
    energy, parts = random_energy(30, 16, seed=1), Parts(experts=3, top_k=2, shared=1, width=4)
    part = deal(energy, parts)
    gates, value = choose(energy, part, parts)
    assert value == pytest.approx(captured(energy, part, parts))
    assert gates[:, :3].sum(1).tolist() == [2.0] * 30
    assert gates[:, 3].tolist() == [1.0] * 30


@pytest.mark.parametrize("parts", TINY)
def test_an_iteration_is_the_best_partition_for_the_choice_before(parts):
    energy = random_energy(40, 8, seed=3)
    gates, _ = choose(energy, deal(energy, parts), parts)
    score = energy.t() @ gates

    def total(part: Tensor) -> float:
        return float(score.gather(1, part[:, None]).sum())

    found = ascend(energy, parts, 1)
    assert total(found) == pytest.approx(max(map(total, partitions(parts))))


@pytest.mark.parametrize("parts", [Parts(6, 2, 2, 8), Parts(8, 1, 0, 8), Parts(4, 3, 4, 8)])
def test_no_iteration_captures_less(parts):
    energy = random_energy(200, 64, seed=3)
    after = [deal(energy, parts), *(ascend(energy, parts, n) for n in range(1, 21))]
    values = [captured(energy, part, parts) for part in after]
    assert all(b >= a for a, b in itertools.pairwise(values))
    assert len(set(values)) > 3
    assert values[-1] == values[-2]  # it ends by itself


@pytest.mark.parametrize("parts", TINY)
def test_it_ends_where_no_partition_is_better_for_the_choice(parts):
    energy = random_energy(40, 8, seed=1)
    found = ascend(energy, parts, 20)
    gates, value = choose(energy, found, parts)
    score = (energy.t() @ gates).double()
    best = max(float(score.gather(1, part[:, None]).sum()) for part in partitions(parts))
    assert value == pytest.approx(best)


def planted(groups: int, width: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Energies, and the part of each unit: groups, one of which a token uses, and units that every token uses."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randperm((groups + 1) * width, generator=generator) % (groups + 1)
    group = torch.randint(groups, (tokens, 1), generator=generator)
    on = (part == group) | (part == groups)
    return F.normalize((0.02 + on) * torch.rand(tokens, len(part), generator=generator), p=1), part


@pytest.mark.parametrize("seed", range(5))
def test_no_partition_of_two_groups_captures_more(seed):
    """Every partition is tried. Of any three units of two groups two are of one: from there it finds the others."""
    energy, _ = planted(2, 3, 60, seed)
    parts = Parts(experts=2, top_k=1, shared=1, width=3)
    found = captured(energy, ascend(energy, parts, 20), parts)
    assert captured(energy, deal(energy, parts), parts) < 0.9 * found
    assert found == pytest.approx(max(captured(energy, part, parts) for part in partitions(parts)))


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_are_found(seed):
    energy, part = planted(7, 16, 1000, seed)
    found = ascend(energy, Parts(experts=7, top_k=1, shared=1, width=16), 20)
    groups = {frozenset((part == g).nonzero().flatten().tolist()) for g in range(7)}
    assert {frozenset((found == e).nonzero().flatten().tolist()) for e in range(7)} == groups
    assert torch.equal(found == 7, part == 7)


def test_the_unit_that_is_captured_most_comes_first():
    b, weights = block(), dense()
    given, parts = material(b, weights), Parts(experts=4, top_k=2, shared=2, width=4)
    found = METHODS.parse("split-energy").plan(b, BlockRecipe("split-energy", 4, 2, shared=2), 0, torch.float32, given)
    energy = unit_energy(b, given)
    part = ascend(energy, parts, 20)
    gates, _ = choose(energy, part, parts)
    for e, units in enumerate(found.partition.experts_EW):
        assert part[units].tolist() == [e] * 4
        amount = [float(energy[gates[:, e] == 1, unit].sum()) for unit in units]
        assert amount == sorted(amount, reverse=True)
    assert part[found.partition.shared_S].tolist() == [4] * 8


def test_refuses_weights_that_are_nan():
    b, weights = block(), dense()
    weights["down"][2, 5] = torch.nan
    with pytest.raises(Refused) as error:
        unit_energy(b, material(b, weights))
    assert str(error.value) == (
        "the energy of the hidden units is NaN: the down projection or the hidden values are NaN or too large\n"
        "  at: encoder.layer.3\n  hint: use another method, such as carve"
    )


def test_an_option_out_of_range():
    with pytest.raises(BadOption, match=r"^split-energy.iterations is 0: it must be at least 1$"):
        METHODS.parse("split-energy{iterations=0}")
