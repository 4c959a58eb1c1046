"""The load loss of the first sparsely gated mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.nn.losses.base import Routed, RouterLoss, Total, here, precise, squared_variation


@dataclass(frozen=True)
class Load(RouterLoss):
    """CV(Load)^2 of the numbers of tokens that experts can expect, smooth because of the noise of noisy-topk."""

    name: ClassVar[str] = "load"
    reads: ClassVar[tuple[str, ...]] = ("logits", "clean", "deviation", "experts")

    weight: float = 0.1

    def of(self, routed: Routed) -> Tensor:
        values = routed.values
        top_k = values["experts"].shape[1]
        return load(values["logits"], values["clean"], values["deviation"], top_k, routed.total)


def load(logits_TE: Tensor, clean_TE: Tensor, deviation_TE: Tensor, top_k: int, total: Total = here) -> Tensor:
    """``CV(Load)^2``, ``Load_i = sum_t Phi((clean_ti - kth_excluding(logits_t, k, i)) / deviation_ti)``: how likely
    token t keeps expert i if the noise of i alone is drawn again.

    ``logits`` are with noise. kth_excluding is the k-th highest of the others; with k = E there is none, and Phi is 1.
    Shazeer et al., arXiv 1701.06538, appendix A, equations 8 to 11.
    """
    logits_TE, clean_TE, deviation_TE = precise(logits_TE), precise(clean_TE), precise(deviation_TE)
    if top_k >= logits_TE.shape[1]:
        return logits_TE.sum() * 0.0
    best, order_TK = logits_TE.topk(top_k + 1, dim=1)
    # Without one of the k best, the k-th of the others is the next one.
    kth_TE = best[:, top_k - 1 : top_k].expand_as(logits_TE)
    kth_TE = kth_TE.scatter(1, order_TK[:, :top_k], best[:, top_k:].expand(-1, top_k))
    deviation_TE = deviation_TE.clamp_min(torch.finfo(deviation_TE.dtype).tiny)  # softplus underflows
    return squared_variation(total(torch.special.ndtr((clean_TE - kth_TE) / deviation_TE).sum(0)))
