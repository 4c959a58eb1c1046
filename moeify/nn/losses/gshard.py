"""The balance loss of GShard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeify.nn.losses.base import Routed, RouterLoss, Total, counts, divided, here, rows, shares


@dataclass(frozen=True)
class GShard(RouterLoss):
    """(1/E) sum_i (c_i / T) m_i over first choices: 1 / E^2 where all are equal."""

    name: ClassVar[str] = "gshard"
    reads: ClassVar[tuple[str, ...]] = ("probabilities", "experts")

    weight: float = 0.01

    def of(self, routed: Routed) -> Tensor:
        return gshard(routed.values["probabilities"], routed.values["experts"], routed.total)


def gshard(probabilities_TE: Tensor, experts_TK: Tensor, total: Total = here) -> Tensor:
    """``(1/E) sum_i (c_i / T) m_i``, c_i the tokens whose first choice (column 0) is expert i, m_i the mean of p_i, p a
    row of ``probabilities`` over its sum. c carries no gradient.

    Lepikhin et al., arXiv 2006.16668, algorithm 1.
    """
    p_TE = shares(probabilities_TE)
    tokens, E = total(rows(p_TE)), p_TE.shape[1]
    first_E = total(counts(experts_TK[:, :1], E).to(p_TE.dtype))
    mean_E = divided(total(p_TE.sum(0)), tokens)
    return (divided(first_E, tokens) * mean_E).sum() / E
