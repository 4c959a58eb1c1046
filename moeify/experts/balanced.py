"""Clusters of equal size."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor


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


def cluster(points_NP: Tensor, centres_EP: Tensor, iterations: int) -> Tensor:
    """Balanced k-means (Malinen and Franti, Balanced k-means for clustering, S+SSPR 2014) from given centres.

    Gives the clusters [E, N / E] of the rows of ``points_NP`` (float32), each sorted by squared distance from its
    mean, nearest first. An iteration assigns the points to the centres at the least total squared distance, then puts
    each centre at the mean of its points; both lower the objective, and it ends where nothing changes.
    """
    clusters = len(centres_EP)
    square_N = points_NP.square().sum(1)
    label: np.ndarray | None = None
    for _ in range(iterations):
        found = assign(_distances(points_NP, square_N, centres_EP))
        if label is not None and (found == label).all():
            break
        label = found
        members_EW = torch.from_numpy(label.argsort(kind="stable").reshape(clusters, -1))
        centres_EP = torch.stack([points_NP[members].mean(0) for members in members_EW])
    assert label is not None, "no iterations"
    distance = _distances(points_NP, square_N, centres_EP)[np.arange(len(label)), label]
    # Nearest first within each cluster, the lower number first among equals.
    return torch.from_numpy(np.lexsort((distance, label)).reshape(clusters, -1))


def _distances(points_NP: Tensor, square_N: Tensor, centres_EP: Tensor) -> np.ndarray:
    product_NE = points_NP @ centres_EP.t()
    return (square_N[:, None] + centres_EP.square().sum(1) - 2 * product_NE).double().numpy()


def spread_seeds(points_NP: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """First centres [E, P] for ``cluster``: points drawn in proportion to the squared distance from those drawn before
    (k-means++: Arthur and Vassilvitskii, SODA 2007).
    """
    count = len(points_NP)
    chosen = [int(torch.randint(count, (), generator=generator))]
    nearest_N = (points_NP - points_NP[chosen[0]]).square().sum(1).double()
    while len(chosen) < clusters:
        # Where all that is left coincides with a centre, any point will do.
        weight_N = nearest_N if nearest_N.sum() > 0 else torch.ones(count, dtype=torch.float64)
        reach = weight_N.cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * reach[-1]
        chosen.append(min(int(torch.searchsorted(reach, draw, right=True)), count - 1))
        nearest_N = torch.minimum(nearest_N, (points_NP - points_NP[chosen[-1]]).square().sum(1))
    return points_NP[chosen]
