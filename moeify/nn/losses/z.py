"""The z-loss: logits stay small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeify.nn.losses.base import Routed, RouterLoss, Total, divided, here, precise, rows


@dataclass(frozen=True)
class Z(RouterLoss):
    """mean_t (logsumexp z_t)^2: keeps logits small, which half precision needs."""

    name: ClassVar[str] = "z"
    reads: ClassVar[tuple[str, ...]] = ("logits",)

    weight: float = 0.001

    def of(self, routed: Routed) -> Tensor:
        return z(routed.values["logits"], routed.total)


def z(logits_TE: Tensor, total: Total = here) -> Tensor:
    """``mean_t (log sum_i exp z_ti)^2``. Zoph et al. (ST-MoE), arXiv 2202.08906, equation 5."""
    square_T = precise(logits_TE).logsumexp(1).square()
    return divided(total(square_T.sum()), total(rows(square_T)))
