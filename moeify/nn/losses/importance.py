"""The importance loss of the first sparsely gated mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeify.nn.losses.base import Routed, RouterLoss, Total, here, precise, squared_variation


@dataclass(frozen=True)
class Importance(RouterLoss):
    """CV(sum_x g(x))^2: experts get equal sums of weights, though not equal numbers of tokens."""

    name: ClassVar[str] = "importance"
    reads: ClassVar[tuple[str, ...]] = ("experts", "weights")

    weight: float = 0.1

    def of(self, routed: Routed) -> Tensor:
        return importance(routed.values["experts"], routed.values["weights"], routed.num_experts, routed.total)


def importance(experts_TK: Tensor, weights_TK: Tensor, num_experts: int, total: Total = here) -> Tensor:
    """``CV(sum_t g_t)^2``, g_t [E] the weights of token t, 0 for experts it does not have.

    Shazeer et al., arXiv 1701.06538, equations 6 and 7.
    """
    weights_N = precise(weights_TK).flatten()
    # One place more, for slots without an expert.
    sums = weights_N.new_zeros(num_experts + 1).scatter_add(0, experts_TK.flatten(), weights_N)
    return squared_variation(total(sums[:num_experts]))
