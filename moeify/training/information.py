"""Entropy and mutual information of counts, and what of it is chance."""

from __future__ import annotations

import torch
from torch import Tensor


def contingency(a_T: Tensor, b_T: Tensor, rows: int, columns: int) -> Tensor:
    """How many tokens have each pair, [rows, columns] float64; number ``rows`` of a, or ``columns`` of b, is none."""
    some = (a_T < rows) & (b_T < columns)
    pairs = a_T[some] * columns + b_T[some]
    return torch.bincount(pairs.cpu(), minlength=rows * columns).double().view(rows, columns)


def entropy(counts: Tensor) -> float:
    """Of the distribution that counts are of, in nats."""
    share = counts / counts.sum().clamp_min(1)
    return -float(torch.special.xlogy(share, share).sum())


def information(counts: Tensor) -> float:
    """Mutual information of rows and columns, in nats; rounding does not make it negative."""
    return max(0.0, entropy(counts.sum(0)) + entropy(counts.sum(1)) - entropy(counts.flatten()))


def information_by_chance(counts: Tensor) -> float:
    """The mean of ``information`` over all tables with the same sums of rows and columns, as if the columns were dealt
    to the tokens at random: what is found where there is nothing to find, in nats.

    About (rows - 1)(columns - 1) / 2T where each column has many tokens, and much more of rare ones. It takes tokens to
    be independent: those of one image are not, so with few images even more than this is chance. A pair that a rows
    and b columns of T tokens meet has a hypergeometric count: Vinh, Epps and Bailey, Information Theoretic Measures for
    Clusterings Comparison, JMLR 11 (2010), eq. 24a. O(rows * tokens).
    """
    total = counts.sum()
    sizes, alike = counts.sum(0).long().unique(return_counts=True)
    b = sizes.repeat_interleave(sizes)  # each size as often as there are counts from 1 to it
    n = torch.arange(1, len(b) + 1) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    columns = alike.repeat_interleave(sizes)
    found = 0.0
    for a in counts.sum(1):
        possible = (n <= a) & (n >= a + b - total)
        k, of = n[possible].double(), b[possible].double()
        chance = (_log_choose(of, k) + _log_choose(total - of, a - k) - _log_choose(total, a)).exp()
        found += float((columns[possible] * chance * k / total * (total * k / (a * of)).log()).sum())
    return found


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
