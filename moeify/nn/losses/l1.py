"""The sparsity loss of ReMoE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeify.errors import BadOption
from moeify.nn.losses.base import Routed, RouterLoss, Total, counts, divided, here, precise, rows


@dataclass(frozen=True)
class L1(RouterLoss):
    """Mean sum of a token's scores, each times its expert's load over the mean load: fewer experts, evenly used.

    Made for the relu router. With ``active`` above 0 its coefficient starts at ``start`` and is multiplied by ``rate``
    after a step with more experts per token than that, divided by it after one with fewer.
    """

    name: ClassVar[str] = "l1"
    reads: ClassVar[tuple[str, ...]] = ("probabilities", "experts")

    active: float = 0.0
    start: float = 1e-8
    rate: float = 1.2
    balance: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate < 1:
            raise BadOption(f"the l1 loss's rate is {self.rate}: it must be at least 1, which changes nothing")

    @property
    def adapts(self) -> bool:
        return self.active > 0

    @property
    def first_factor(self) -> float:
        return self.start if self.adapts else 1.0

    def next_factor(self, factor: float, routed: Sequence[Routed]) -> float:
        """``factor * rate^sign(mean experts of a token - active)``, the mean over tokens and blocks."""
        used = sum(float(one.total(counts(one.values["experts"], one.num_experts).sum())) for one in routed)
        tokens = sum(float(one.total(rows(one.values["probabilities"]))) for one in routed)
        over = used - self.active * tokens
        return factor * self.rate ** ((over > 0) - (over < 0))

    def of(self, routed: Routed) -> Tensor:
        return l1(routed.values["probabilities"], routed.values["experts"], self.balance, routed.total)


def l1(probabilities_TE: Tensor, experts_TK: Tensor, balance: bool = True, total: Total = here) -> Tensor:
    """``(1/T) sum_t sum_i f_i p_ti``, f_i the load of expert i over the mean load, or 1 without ``balance``; f carries
    no gradient. Scores are at least 0.

    Wang, Zhu, Chen (ReMoE), arXiv 2412.14711, section 4, where a mean over the layers stands for the sum over blocks
    that ``moeify.losses`` takes, and f_i is over the mean load of the wanted number of experts.
    """
    p_TE = precise(probabilities_TE)
    E = p_TE.shape[1]
    mean_E = divided(total(p_TE.sum(0)), total(rows(p_TE)))
    if not balance:
        return mean_E.sum()
    slots_E = total(counts(experts_TK, E).to(p_TE.dtype))
    return (divided(slots_E, slots_E.mean()) * mean_E).sum()
