"""The sample-similarity loss: tokens that are alike go to one expert, others to others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.nn.losses.base import Routed, RouterLoss, precise, shares


@dataclass(frozen=True)
class Similarity(RouterLoss):
    """Distances of tokens that share an expert, less those of tokens that do not; up to ``tokens`` of them, evenly.

    ``same`` and ``different`` are beta_s and beta_d. The cost grows with the square of ``tokens``.
    """

    name: ClassVar[str] = "similarity"
    reads: ClassVar[tuple[str, ...]] = ("probabilities", "inputs")
    over_pairs: ClassVar[bool] = True

    same: float = 0.1
    different: float = 0.1
    tokens: int = 1024

    def of(self, routed: Routed) -> Tensor:
        p_TE, x_TD = routed.values["probabilities"], routed.values["inputs"]
        step = max(1, -(-len(x_TD) // self.tokens)) if self.tokens else 1
        return similarity(p_TE[::step], x_TD[::step], self.same, self.different)


def similarity(probabilities_TE: Tensor, inputs_TD: Tensor, same: float, different: float) -> Tensor:
    """``1/T^2 sum_{x,x'} d [same / E sum_i p_i(x) p_i(x') - different / (E^2 - E) sum_{i != j} p_i(x) p_j(x')]``, d
    the Euclidean distance of the inputs x and x' over the largest; no gradient goes through d.

    Krishnamurthy, Watkins, Gaertner, arXiv 2302.14703, section 4. With one expert the second sum is 0.
    """
    p_TE = shares(probabilities_TE)
    T, E = p_TE.shape
    x_TD = precise(inputs_TD.detach())
    d_TT = torch.cdist(x_TD, x_TD, compute_mode="donot_use_mm_for_euclid_dist").to(p_TE.dtype)
    d_TT = d_TT / d_TT.max().clamp_min(torch.finfo(d_TT.dtype).tiny) if T else d_TT
    alike_TT = p_TE @ p_TE.t()
    # sum_{i != j} p_i(x) p_j(x') = 1 - sum_i p_i(x) p_i(x'), as rows sum to 1.
    sums_T = p_TE.sum(1)
    apart_TT = sums_T[:, None] * sums_T[None, :] - alike_TT
    value = same / E * (alike_TT * d_TT).sum()
    if E > 1:
        value = value - different / (E * E - E) * (apart_TT * d_TT).sum()
    return value / max(T * T, 1)
