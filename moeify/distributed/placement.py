"""Which rank holds which experts, from measured loads.

Longest processing time first (Graham, SIAM J. Appl. Math. 17, 1969), with as many places on a rank as it has, then
swaps of two experts that make the fullest rank lighter, until there is none. Where one expert alone is more than a
rank's share only copies of it help: ``with_copies`` gives free places to whatever then has the most rows per copy.
Tokens are spread over the copies of an expert evenly.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from moeify.errors import BadOption
from moeify.ir.sharding import share

Rows = Sequence[float] | NDArray[numpy.float64]  # of each expert
_GAIN = 1e-9  # of the mean: a swap that gains less is rounding
_MOST_SWAPS = 2000  # never reached by hundreds of experts; with thousands the rest is worth less than the time


@dataclass(frozen=True)
class Placement:
    """``experts[r]`` are the experts of rank r, in the order of its stacked weights; one may stand on several ranks."""

    experts: tuple[tuple[int, ...], ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The expert of every place, ranks one after the other: the new order of the stacked weights."""
        return tuple(itertools.chain.from_iterable(self.experts))

    def copies(self, num_experts: int) -> NDArray[numpy.int64]:
        return numpy.bincount(self.order, minlength=num_experts)

    def rank_loads(self, loads: Rows) -> NDArray[numpy.float64]:
        """Rows of every rank when the experts have these, copies sharing them."""
        each = numpy.asarray(loads, dtype=numpy.float64) / numpy.maximum(self.copies(len(loads)), 1)
        return numpy.array([sum(each[list(held)]) for held in self.experts])

    def imbalance(self, loads: Rows) -> float:
        """Rows of the fullest rank over the mean; 1 for no rows at all."""
        ranks = self.rank_loads(loads)
        return float(ranks.max() / ranks.mean()) if ranks.sum() else 1.0


def split_sizes(experts: int, ranks: int) -> tuple[int, ...]:
    """Experts of each rank as shard-experts cuts them: 8 on 3 is (3, 3, 2), 9 on 4 is (3, 3, 3, 0)."""
    return tuple(stop - start for start, stop in (share(experts, ranks, rank) for rank in range(ranks)))


def in_order(experts: int, ranks: int) -> Placement:
    """The experts as they are numbered."""
    ends = list(itertools.accumulate(split_sizes(experts, ranks)))
    return Placement(tuple(tuple(range(first, last)) for first, last in zip([0, *ends], ends)))


def place(loads: Rows, ranks: int) -> Placement:
    """Every expert once, ``split_sizes`` on each rank; never worse than ``in_order``."""
    _check(loads, ranks)
    found = _arranged(list(range(len(loads))), list(loads), split_sizes(len(loads), ranks))
    plain = in_order(len(loads), ranks)
    return found if found.imbalance(loads) < plain.imbalance(loads) else plain


def with_copies(loads: Rows, ranks: int, extra: int = 1) -> Placement:
    """Every expert at least once, and ``extra`` more places for every rank for copies, which inference alone can use.

    An expert has at most one copy on a rank as far as it goes; a place that no copy can use holds some expert
    again all the same, so that the stacked weights of all ranks keep their sizes.
    """
    _check(loads, ranks)
    if extra < 0:
        raise BadOption(f"the number of extra places is {extra}: it must be at least 0")
    copies = [1] * len(loads)
    hottest = [(-float(load), expert) for expert, load in enumerate(loads)]
    heapq.heapify(hottest)
    for _ in range(extra * ranks):
        while len(hottest) > 1 and copies[hottest[0][1]] >= ranks:
            heapq.heappop(hottest)
        expert = hottest[0][1]
        copies[expert] += 1
        heapq.heapreplace(hottest, (-float(loads[expert]) / copies[expert], expert))
    items = [expert for expert, times in enumerate(copies) for _ in range(times)]
    sizes = split_sizes(len(items), ranks)
    return _arranged(items, [loads[e] / copies[e] for e in items], sizes)


def _check(loads: Rows, ranks: int) -> None:
    if ranks < 1:
        raise BadOption(f"the number of ranks is {ranks}: it must be positive")
    if not len(loads) or min(loads) < 0:
        raise BadOption("loads must be one number of at least 0 per expert")


def _arranged(items: list[int], loads: list[float], sizes: Sequence[int]) -> Placement:
    """``items[i]`` is an expert (again for every copy) of ``loads[i]`` rows."""
    held = _swapped(_longest_first(items, loads, sizes), items, numpy.asarray(loads, dtype=numpy.float64))
    return Placement(tuple(tuple(sorted(items[i] for i in rank)) for rank in held))


def _longest_first(items: list[int], loads: list[float], sizes: Sequence[int]) -> list[list[int]]:
    held: list[list[int]] = [[] for _ in sizes]
    has: list[set[int]] = [set() for _ in sizes]
    lightest = [(0.0, rank) for rank, size in enumerate(sizes) if size]
    for i in sorted(range(len(items)), key=lambda i: (-loads[i], items[i])):
        passed = []  # ranks that hold the expert already
        while len(lightest) > 1 and items[i] in has[lightest[0][1]]:
            passed.append(heapq.heappop(lightest))
        load, rank = heapq.heappop(lightest)
        held[rank].append(i)
        has[rank].add(items[i])
        if len(held[rank]) < sizes[rank]:
            passed.append((load + loads[i], rank))
        for entry in passed:
            heapq.heappush(lightest, entry)
    return held


def _swapped(held: list[list[int]], items: list[int], loads: NDArray[numpy.float64]) -> list[list[int]]:
    """Exchange two items, one of them on the fullest rank, as long as that makes the fuller of the two lighter."""
    expert = numpy.asarray(items)
    rank_of = numpy.empty(len(items), dtype=numpy.int64)
    has = numpy.zeros((len(held), max(items) + 1), dtype=numpy.int32)  # copies of an expert on a rank
    for rank, own in enumerate(held):
        rank_of[own] = rank
        has[rank] = numpy.bincount(expert[own], minlength=has.shape[1])
    total = numpy.bincount(rank_of, weights=loads, minlength=len(held))
    least = _GAIN * total.mean()
    for _ in range(_MOST_SWAPS):
        full = int(total.argmax())
        mine = numpy.flatnonzero(rank_of == full)
        change = loads[None, :] - loads[mine, None]
        fuller = numpy.maximum(total[full] + change, total[rank_of][None, :] - change)
        twice = (has[full][expert] > 0)[None, :] | (has[:, expert[mine]].T[:, rank_of] > 0)
        fuller[twice | (rank_of == full)[None, :]] = numpy.inf
        best = int(fuller.argmin())
        if not fuller.flat[best] < total[full] - least:
            break
        i, j = int(mine[best // len(items)]), best % len(items)
        other = int(rank_of[j])
        rank_of[i], rank_of[j] = other, full
        for item, source, target in ((i, full, other), (j, other, full)):
            total[[source, target]] += (-loads[item], loads[item])
            has[[source, target], expert[item]] += (-1, 1)
    by_rank = numpy.argsort(rank_of, kind="stable")
    ends = numpy.cumsum(numpy.bincount(rank_of, minlength=len(held)))
    return [part.tolist() for part in numpy.split(by_rank, ends[:-1])]
