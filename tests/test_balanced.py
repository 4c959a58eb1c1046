"""Clusters of equal size: against every possible assignment, and against networkx on larger problems."""

from __future__ import annotations

import itertools

import networkx
import numpy as np
import pytest
import torch

from moeify.experts.balanced import assign, cluster, spread_seeds


def total(cost: np.ndarray, label: np.ndarray) -> float:
    return float(cost[np.arange(len(label)), label].sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("units", "clusters"), [(4, 2), (6, 3), (6, 1), (5, 5), (8, 2)])
def test_no_other_balanced_assignment_is_cheaper(units, clusters, seed):
    cost = np.random.default_rng(seed).normal(size=(units, clusters))
    label = assign(cost)
    assert (np.bincount(label, minlength=clusters) == units // clusters).all()
    slots = np.repeat(np.arange(clusters), units // clusters)
    best = min(total(cost, np.array(order)) for order in set(itertools.permutations(slots.tolist())))
    assert total(cost, label) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(1, 2, 5), (4, 1, 1), (1, 7)])
def test_clusters_may_have_sizes_of_their_own(size, seed):
    cost = np.random.default_rng(seed).normal(size=(sum(size), len(size)))
    label = assign(cost, np.array(size))
    assert np.bincount(label).tolist() == list(size)
    slots = np.repeat(np.arange(len(size)), size).tolist()
    best = min(total(cost, np.array(order)) for order in set(itertools.permutations(slots)))
    assert total(cost, label) == pytest.approx(best)


@pytest.mark.parametrize("skew", [0, 10])
def test_larger_problems_cost_what_a_flow_solver_says(skew):
    """``skew`` makes all units want the same cluster, so that nearly all of them must move."""
    cost = np.random.default_rng(0).integers(0, 1000, size=(120, 8)) + 1000 * skew * np.arange(8)
    graph = networkx.DiGraph()
    for n, row in enumerate(cost.tolist()):
        graph.add_node(("unit", n), demand=-1)
        for e, value in enumerate(row):
            graph.add_edge(("unit", n), e, weight=value, capacity=1)
    for e in range(8):
        graph.add_node(e, demand=15)
    label = assign(cost)
    assert (np.bincount(label) == 15).all()
    assert total(cost, label) == networkx.min_cost_flow_cost(graph)


def test_equal_costs_are_no_trouble():
    assert np.bincount(assign(np.zeros((12, 4)))).tolist() == [3, 3, 3, 3]


def test_clusters_that_are_plain_to_see_are_found():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4) * 10
    member = torch.arange(4).repeat(6)
    points = centres[member] + torch.randn(24, 4, generator=generator)
    found = cluster(points, spread_seeds(points, 4, generator), 30)
    assert {frozenset(row.tolist()) for row in found} == {
        frozenset((member == e).nonzero().flatten().tolist()) for e in range(4)
    }


def test_members_stand_nearest_to_their_mean_first():
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    found = cluster(points, points[:4], 30)
    assert sorted(found.flatten().tolist()) == list(range(20))
    for members in found:
        distance = (points[members] - points[members].mean(0)).square().sum(1)
        assert (distance.diff() >= 0).all()


def test_no_assignment_to_the_final_means_is_cheaper():
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(2))
    found = cluster(points, points[:2], 30)
    means = torch.stack([points[members].mean(0) for members in found])
    distance = torch.cdist(points, means).square().numpy()
    label = np.empty(8, dtype=int)
    for e, members in enumerate(found.tolist()):
        label[members] = e
    ways = (list(half) for half in itertools.combinations(range(8), 4))
    best = min(total(distance, np.isin(np.arange(8), half).astype(int)) for half in ways)
    assert total(distance, label) == pytest.approx(best)


def test_seeds_are_points_and_spread_out():
    points = torch.zeros(100, 2)
    points[99] = 5
    for seed in range(5):
        seeds = spread_seeds(points, 2, torch.Generator().manual_seed(seed))
        assert sorted(seeds.sum(1).tolist()) == [0, 10]  # the second is never another zero


def test_points_that_are_all_alike_still_give_seeds():
    assert spread_seeds(torch.ones(6, 2), 3, torch.Generator().manual_seed(0)).shape == (3, 2)
