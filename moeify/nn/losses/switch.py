"""The balance loss of the Switch Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeify.nn.losses.base import Routed, RouterLoss, Total, counts, divided, here, rows, shares


@dataclass(frozen=True)
class Switch(RouterLoss):
    """E sum_i f_i P_i: experts that get many tokens get lower probabilities. 1 where all are equal."""

    name: ClassVar[str] = "switch"
    reads: ClassVar[tuple[str, ...]] = ("probabilities", "experts")

    weight: float = 0.01

    def of(self, routed: Routed) -> Tensor:
        return switch(routed.values["probabilities"], routed.values["experts"], routed.total)


def switch(probabilities_TE: Tensor, experts_TK: Tensor, total: Total = here) -> Tensor:
    """``E sum_i f_i P_i``, f_i the share of the routed slots that expert i has, P_i the mean of p_i, p a row of
    ``probabilities`` over its sum. f carries no gradient.

    Fedus, Zoph, Shazeer, arXiv 2101.03961, equations 4 to 6, where K is 1.
    """
    p_TE = shares(probabilities_TE)
    E = p_TE.shape[1]
    slots_E = total(counts(experts_TK, E).to(p_TE.dtype))
    mean_E = divided(total(p_TE.sum(0)), total(rows(p_TE)))
    return E * (divided(slots_E, slots_E.sum()) * mean_E).sum()
