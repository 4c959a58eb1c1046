"""Clusters of equal size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moeify.ir.assignment import assign


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
