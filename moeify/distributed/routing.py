"""Where tokens go: shares of the experts, the fullest rank, and what a capacity drops.

Tokens are taken to be independent and alike: each goes to expert e with the same probability ``K * share[e]``, so the
number of an expert's tokens is binomial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray

from moeify.distributed.placement import Placement
from moeify.ir.sharding import capacity

Shares = NDArray[numpy.float64]
DRAWS = 32
_TAIL = 12.0  # standard deviations beyond which a binomial has nothing that float64 can see


def zipf(experts: int, exponent: float, top_k: int) -> Shares:
    """Shares proportional to ``rank ** -exponent``, the first expert the hottest; exponent 0: all alike.

    No expert can have more than 1 / K: a token's experts are different.
    """
    return capped(numpy.arange(1, experts + 1, dtype=numpy.float64) ** -exponent, top_k)


def shares_of(loads: Sequence[float], top_k: int) -> Shares:
    """Measured rows per expert as shares."""
    return capped(numpy.asarray(loads, dtype=numpy.float64), top_k)


def capped(weights: Shares, top_k: int) -> Shares:
    """Shares in these proportions, those above 1 / K cut to it and the others raised."""
    if not weights.sum():
        return numpy.full(len(weights), 1.0 / len(weights))
    shares = weights / weights.sum()
    most, full = 1.0 / top_k, numpy.zeros(len(shares), dtype=bool)
    while (over := (shares > most * (1 + 1e-12)) & ~full).any():
        full |= over
        shares[full] = most
        rest = shares[~full].sum()
        if rest:
            shares[~full] *= max(1.0 - most * full.sum(), 0.0) / rest
    return shares


def imbalance(shares: Shares, placement: Placement, tokens: int, top_k: int, seed: int = 0) -> float:
    """Rows of the fullest rank over the mean of the ranks: the mean of ``DRAWS`` simulated steps.

    ``tokens`` are those of all ranks together. An expert with copies gives each the same part of its rows.
    """
    draw = numpy.random.default_rng(seed)
    chosen = numpy.minimum(shares * top_k, 1.0)
    rows = draw.binomial(tokens, chosen, size=(DRAWS, len(shares))).astype(numpy.float64)
    rows /= placement.copies(len(shares))
    ends = numpy.cumsum([len(held) for held in placement.experts])
    running = numpy.pad(rows[:, list(placement.order)].cumsum(axis=1), ((0, 0), (1, 0)))
    per_rank = numpy.diff(running[:, ends], axis=1, prepend=0.0)
    mean = per_rank.mean(axis=1)
    return float((per_rank.max(axis=1)[mean > 0] / mean[mean > 0]).mean()) if mean.any() else 1.0


def drop_share(shares: Shares, tokens: int, top_k: int, factor: float) -> float:
    """The share of rows over the capacity of a rank with T tokens, expected: ``sum_e E[(X_e - C)+] / (T * K)``."""
    limit = capacity(tokens * top_k, len(shares), factor)
    chances, times = numpy.unique(numpy.minimum(shares * top_k, 1.0).round(15), return_counts=True)
    over = sum(_excess(tokens, float(p), limit) * int(n) for p, n in zip(chances, times, strict=True))
    return over / (tokens * top_k)


def _excess(tokens: int, chance: float, limit: int) -> float:
    """E[(X - limit)+] of a binomial X, by its terms near the mean: of both tails the one that is shorter."""
    mean = tokens * chance
    reach = _TAIL * math.sqrt(mean * (1 - chance)) + _TAIL**2
    most = min(tokens, math.ceil(mean + reach))
    if limit >= most:
        return 0.0
    if limit >= mean:
        terms = torch.arange(limit + 1, most + 1, dtype=torch.float64)
        return float(((terms - limit) * _probability(terms, tokens, chance)).sum())
    terms = torch.arange(min(max(math.floor(mean - reach), 0), limit), limit, dtype=torch.float64)
    return mean - limit + float(((limit - terms) * _probability(terms, tokens, chance)).sum())


def _probability(terms: torch.Tensor, n: int, p: float) -> torch.Tensor:
    """P(X = k) for every k of a binomial(n, p)."""
    if p >= 1.0:
        return (terms == n).double()
    if p <= 0.0:
        return (terms == 0).double()
    ways = math.lgamma(n + 1) - torch.lgamma(terms + 1) - torch.lgamma(n - terms + 1)
    return torch.exp(ways + terms * math.log(p) + (n - terms) * math.log1p(-p))
