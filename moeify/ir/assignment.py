"""Units to groups of given sizes at the least total cost."""

from __future__ import annotations

import itertools

import numpy as np


def assign(cost_NE: np.ndarray, size_E: np.ndarray | None = None) -> np.ndarray:
    """The cluster [N] of each unit at the least total cost, ``size_E`` units in every cluster, by default N / E.

    This is the linear assignment problem whose columns come in groups of equal ones, a transportation problem.
    Each unit starts in its cheapest cluster, at prices that spread the units nearly as wanted; then one unit after
    another goes from a cluster with too many to one with too few along the cheapest chain of moves (successive shortest
    paths: Ahuja, Magnanti, Orlin, Network Flows, 1993, 9.7; exact whatever the prices, which save chains). The chains
    run over E clusters, so N = 14336 takes seconds, where a solver for the N x N problem needs gigabytes.
    Deterministic: equal costs go to the lower number. The sizes must be positive and sum to N, and the costs finite.
    """
    units, clusters = cost_NE.shape
    size = np.full(clusters, units // clusters) if size_E is None else size_E
    cost = np.asarray(cost_NE, dtype=np.float64)
    label = (cost + _prices(cost, size)).argmin(1)
    count = np.bincount(label, minlength=clusters)
    step = np.full((clusters, clusters), np.inf)  # what the cheapest move from i to j costs
    mover = np.zeros((clusters, clusters), dtype=np.int64)  # and which unit makes it
    # Sums of costs round: a chain must be cheaper by more than that, or rounding alone could make a circle of it.
    least = 1e-12 * max(1.0, float(np.abs(cost).max(initial=0.0)))

    def weigh(cluster: int) -> None:
        members = np.flatnonzero(label == cluster)
        if not len(members):
            step[cluster] = np.inf
            return
        change = cost[members] - cost[members, cluster, None]
        cheapest = change.argmin(0)
        step[cluster] = change[cheapest, np.arange(clusters)]
        step[cluster, cluster] = np.inf
        mover[cluster] = members[cheapest]

    for cluster in range(clusters):
        weigh(cluster)
    while (count > size).any():
        chain = _cheapest_chain(step, count > size, count < size, least)
        for source, target in itertools.pairwise(chain):
            label[mover[source, target]] = target
        count[chain[0]] -= 1
        count[chain[-1]] += 1
        for cluster in chain:
            weigh(cluster)
    return label


def _prices(cost: np.ndarray, size: np.ndarray, rounds: int = 100) -> np.ndarray:
    """What each cluster charges [E] so that about as many units as it should have find it cheapest: the best of some
    subgradient steps of the dual problem.
    """
    units, clusters = cost.shape
    price, best = np.zeros(clusters), np.zeros(clusters)
    step, least = cost.std(), units
    for n in range(rounds):
        count = np.bincount((cost + price).argmin(1), minlength=clusters)
        surplus = int(np.maximum(count - size, 0).sum())
        if surplus < least:
            least, best = surplus, price
        price = price + step / (n + 1) * (count / size - 1)
    return best


def _cheapest_chain(step: np.ndarray, full: np.ndarray, short: np.ndarray, least: float) -> list[int]:
    """Clusters from one of ``full`` to one of ``short`` by the cheapest steps (Bellman-Ford)."""
    far = np.where(full, 0.0, np.inf)
    before = np.full(len(far), -1)
    for _ in range(len(far)):
        through = far[:, None] + step
        best = through.argmin(0)
        reached = through[best, np.arange(len(far))]
        better = reached < far - least
        if not better.any():
            break
        far[better], before[better] = reached[better], best[better]
    chain = [int(np.where(short, far, np.inf).argmin())]
    while before[chain[-1]] >= 0:
        chain.append(int(before[chain[-1]]))
    return chain[::-1]
