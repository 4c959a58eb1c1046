"""Fits the constants of a lowering's cost model to measured times."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from moeify.backends import roofline
from moeify.backends.roofline import Kernel, Rates, Shape

# The constants and what they can be at all: a fit to noisy times must not explain them with the impossible.
_BOUNDS = {
    "call": (1e-6, 1e-3),
    "expert": (1e-7, 1e-4),
    "efficiency": (0.05, 1.0),
    "half_rows": (0.1, 64.0),
    "stream": (0.1, 2.0),  # above 1 where weights stay in a cache
    "passes": (0.1, 20.0),
    "repack": (0.01, 10.0),
}
_STEPS, _STARTS = 4000, 4
Point = tuple[Shape, int, float]  # shape, tokens, seconds


def fit(first: Kernel, points: Sequence[Point], peaks: tuple[float, float], threads: int) -> tuple[Kernel, float]:
    """The kernel that is closest in the logarithm of time, and its root mean square relative error.

    ``first`` is where the search begins; a constant that is 0 there stays 0.

    Random steps of shrinking size in the logarithms of the constants, from several seeds: there is no gradient at
    the corners of the roofline. Times are the best of their rounds, which a busy neighbour disturbs least.
    """
    found = [_descend(random.Random(seed), first, points, peaks, threads) for seed in range(_STARTS)]
    loss, kernel = min(found, key=lambda pair: pair[0])
    rounded = {key: float(f"{getattr(kernel, key):.3g}") for key in _BOUNDS}
    return dataclasses.replace(kernel, **rounded), math.sqrt(loss)  # type: ignore[arg-type]


def _descend(
    draw: random.Random, first: Kernel, points: Sequence[Point], peaks: tuple[float, float], threads: int
) -> tuple[float, Kernel]:
    best = first
    free = [key for key in _BOUNDS if getattr(best, key) > 0]
    least = _loss(best, points, peaks, threads)
    for step in range(_STEPS):
        width = 0.5 * (1 - step / _STEPS) + 0.01
        moved = {
            key: min(max(getattr(best, key) * math.exp(draw.gauss(0, width)), _BOUNDS[key][0]), _BOUNDS[key][1])
            for key in free
            if draw.random() < 0.5
        }
        tried = dataclasses.replace(best, **moved)  # type: ignore[arg-type]
        loss = _loss(tried, points, peaks, threads)
        if loss < least:
            best, least = tried, loss
    return least, best


def _loss(kernel: Kernel, points: Sequence[Point], peaks: tuple[float, float], threads: int) -> float:
    """The mean square of the logarithm of modelled over measured time."""
    rates = Rates(peaks[0] / threads, peaks[1])
    errors = [
        math.log(roofline.seconds(kernel, rates, shape, False, tokens, threads) / seconds)
        for shape, tokens, seconds in points
    ]
    return sum(error**2 for error in errors) / len(errors)
