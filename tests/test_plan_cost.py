"""The cost model against numbers worked by hand and against counting everything out."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest

from moeify.distributed import cost, routing
from moeify.distributed.cost import Group, Link
from moeify.distributed.effective import LAWS, effective_parameters
from moeify.distributed.placement import Placement, in_order
from moeify.errors import BadOption
from moeify.ir.sharding import capacity

INTRA, INTER = Link(1e-6, 100e9), Link(1e-5, 10e9)


def test_bytes_of_the_worked_example():
    """D 4096, K 2, bfloat16, 8 ranks: 28.7 kB leave a rank per token, dispatch and combine."""
    assert cost.leaving(2 * (4096 + 4096) * 2, 8) == 28672


def test_bytes_are_those_of_rows_that_were_counted():
    W, T, K, D, item = 4, 60, 2, 8, 4
    experts = numpy.arange(T * K) % W  # one expert per rank, chosen evenly: rank 0 keeps a quarter of its rows
    assert cost.leaving(T * K * D * item, W) == (experts != 0).sum() * D * item


def test_flat_waits_for_the_slower_kind_of_link():
    group = Group(16, 8)
    # 7 messages and 7/16 of 16 MB at 100 GB/s; 8 messages and 8/16 of it at 10 GB/s
    assert cost.flat_seconds(16e6, group, INTRA, INTER) == pytest.approx(max(7e-6 + 7e6 / 100e9, 8e-5 + 8e6 / 10e9))
    assert cost.flat_seconds(16e9, group, Link(0, 1e6), INTER) == pytest.approx(7e9 / 1e6)


def test_hierarchical_crosses_once_and_then_spreads():
    group = Group(16, 8)
    assert cost.hierarchical_seconds(16e6, group, INTRA, INTER, 0.5) == pytest.approx(
        1e-5 + 8e6 * 0.5 / 10e9 + 7e-6 + 14e6 / 100e9
    )


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_within_one_node_there_is_nothing_to_cross(ranks):
    group = Group(ranks, 8)
    assert group.nodes == 1
    flat = cost.flat_seconds(1e6, group, INTRA, INTER)
    assert flat == cost.hierarchical_seconds(1e6, group, INTRA, INTER)
    assert flat == pytest.approx((ranks - 1) * 1e-6 + 1e6 * (ranks - 1) / ranks / 100e9)


def test_distinct_nodes_of_the_worked_example():
    assert cost.distinct_nodes([32] * 8, 8) == pytest.approx(5.29, abs=0.005)


@pytest.mark.parametrize(("sizes", "top_k"), [((3, 3, 2), 3), ((4, 4), 2), ((2, 2, 2, 0), 6), ((5, 1), 1)])
def test_distinct_nodes_count_all_choices(sizes, top_k):
    node = [n for n, size in enumerate(sizes) for _ in range(size)]
    choices = list(itertools.combinations(node, top_k))
    assert cost.distinct_nodes(sizes, top_k) == pytest.approx(sum(len(set(c)) for c in choices) / len(choices))


def test_compute_is_a_roofline():
    assert cost.compute_seconds(100, 10, peak=10, bandwidth=2) == 10
    assert cost.compute_seconds(100, 10, peak=100, bandwidth=2) == 5


def test_touched_experts_count_all_choices():
    pairs = list(itertools.combinations(range(4), 2))
    tokens = [set(a) | set(b) | set(c) for a, b, c in itertools.product(pairs, repeat=3)]
    assert cost.touched_experts(4, 2, 4, 3) == pytest.approx(sum(map(len, tokens)) / len(tokens))


def test_budgets():
    # A weight of 2 bytes at 1 byte/s takes as long as 2 FLOPs per row at 10 FLOP/s for 10 rows.
    assert cost.compute_bound_rows(2, peak=10, bandwidth=1) == 10
    # 8 ranks: 1 us at 1 GB/s is 1000 bytes to one rank, 8000 to all, 80 tokens of 100 bytes.
    assert cost.bandwidth_bound_tokens(100, 8, Link(1e-6, 1e9)) == pytest.approx(80)


@pytest.mark.parametrize(("tokens", "factor"), [(7, 1.0), (12, 1.25), (12, 0.5), (9, 4.0)])
@pytest.mark.parametrize("shares", [(0.25,) * 4, (0.5, 0.3, 0.2, 0.0)])
def test_dropped_rows_sum_the_binomial(tokens, factor, shares):
    top_k = 2
    limit = math.ceil(tokens * top_k / 4 * factor)
    over = 0.0
    for share in shares:
        p = min(share * top_k, 1.0)
        chance = [math.comb(tokens, k) * p**k * (1 - p) ** (tokens - k) for k in range(tokens + 1)]
        over += sum(max(k - limit, 0) * c for k, c in enumerate(chance))
    found = routing.drop_share(numpy.array(shares), tokens, top_k, factor)
    assert found == pytest.approx(over / (tokens * top_k), abs=1e-12)


def test_dropped_rows_of_many_tokens_are_those_of_a_draw():
    shares, tokens = routing.zipf(64, 0.8, 2), 20000
    rows = numpy.random.default_rng(0).binomial(tokens, shares * 2, size=(200, 64))
    limit = capacity(tokens * 2, 64, 1.25)
    drawn = numpy.maximum(rows - limit, 0).sum() / (200 * tokens * 2)
    # 200 draws of 64 experts: the mean of what is dropped is known to about 0.1 %.
    assert routing.drop_share(shares, tokens, 2, 1.25) == pytest.approx(drawn, rel=5e-3)


def test_capacity_takes_the_factor_as_it_is_written():
    assert capacity(10, 1, 1.1) == 11  # 1.1 * 10 is a little more in binary
    assert capacity(4096 * 2, 64, 1.25) == 160
    assert capacity(9, 4, 1.0) == 3
    assert capacity(1, 64, 0.5) == 1


def test_no_expert_gets_a_token_twice():
    shares = routing.zipf(8, 3.0, 2)
    assert shares.max() == pytest.approx(0.5)
    assert shares.sum() == pytest.approx(1.0)
    assert routing.shares_of([0, 0, 0], 1).tolist() == [1 / 3] * 3


def test_imbalance_counts_all_steps():
    """Two tokens choose one of two experts: 1, 1 or 2, 0 with equal chance, so 1.5."""
    found = numpy.mean([routing.imbalance(numpy.array([0.5, 0.5]), in_order(2, 2), 2, 1, seed) for seed in range(200)])
    # Rows of the two experts are drawn apart, 0 and 0 left out: (1 * 5 + 4/3 * 4 + 2 * 6) / 15. 6400 draws: 0.5 %.
    assert found == pytest.approx((5 + 16 / 3 + 12) / 15, rel=0.01)


def test_imbalance_of_many_tokens_is_that_of_the_shares():
    placement = Placement(((0, 1), (2, 3)))
    shares = numpy.array([0.4, 0.3, 0.2, 0.1])
    assert routing.imbalance(shares, placement, 10**9, 1) == pytest.approx(1.4, rel=1e-3)


@pytest.mark.parametrize(
    ("parameters", "experts", "expected"),
    [(5e6, 128, (51.8e6, 48.9e6, 47.0e6)), (7e9, 8, (10.2e9, 8.1e9, 8.7e9))],
)
def test_effective_parameters_of_the_paper(parameters, experts, expected):
    found = [effective_parameters(law, parameters, experts) for law in LAWS]
    assert found == pytest.approx(expected, rel=7e-3)  # the paper gives two or three digits


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_one_expert_is_the_dense_model(law):
    assert effective_parameters(law, 1e8, 1) == pytest.approx(1e8)


def test_effective_parameters_refuse_nothing():
    with pytest.raises(BadOption, match="0 parameters and 8 experts: both must be at least 1"):
        effective_parameters(LAWS[0], 0, 8)
