"""The allocations worth having: least loss for their cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One of the things a group of blocks may become."""

    loss: float
    cost: float


@dataclass(frozen=True)
class Point:
    """An allocation: the number of the option of each group, and the sums."""

    options: tuple[int, ...]
    loss: float
    cost: float


def frontier(groups: Sequence[Sequence[Option]]) -> list[Point]:
    """Allocations from all first options (dense: loss 0) on, each with less cost and more loss than the one before.

    They are the corners of the lower convex hull of (cost, loss) over all allocations: a corner has the least loss of
    all that cost no more, and the least cost of all that lose no more. Between two corners there may be others, which
    are left out: a step changes one group only, by at most its largest step. Losses of groups add up. (The greedy
    solution of the linear multiple-choice knapsack problem: Sinha and Zoltners, Operations Research 27, 1979.)
    """
    chosen = [0] * len(groups)
    loss, cost = (sum(getattr(options[0], name) for options in groups) for name in ("loss", "cost"))
    points = [Point(tuple(chosen), loss, cost)]
    # Slopes along a hull rise, so sorting all steps keeps those of a group in order; the sort is stable for equal ones.
    steps = [(slope, group, to) for group, options in enumerate(groups) for slope, to in _hull(options)]
    for _, group, to in sorted(steps, key=lambda step: step[0]):
        loss += groups[group][to].loss - groups[group][chosen[group]].loss
        cost += groups[group][to].cost - groups[group][chosen[group]].cost
        chosen[group] = to
        points.append(Point(tuple(chosen), loss, cost))
    return points


def _hull(options: Sequence[Option]) -> list[tuple[float, int]]:
    """(loss per cost saved, option) of the steps down the hull from the first option, slopes rising."""
    steps: list[tuple[float, int]] = []
    at = 0
    while True:
        here = options[at]
        cheaper = [number for number, option in enumerate(options) if option.cost < here.cost]
        if not cheaper:
            return steps
        # Of equal slopes the longer step: what lies between is on the line.
        slopes = {to: (options[to].loss - here.loss) / (here.cost - options[to].cost) for to in cheaper}
        at = min(cheaper, key=lambda to: (slopes[to], options[to].cost))
        steps.append((slopes[at], at))
