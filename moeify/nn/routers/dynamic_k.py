"""Dynamic-k: the experts whose output is expected to be nearly as large as the largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.ir.no_expert import without_expert
from moeify.nn.routers.choose import first, highest
from moeify.nn.routers.topk import TopK


@dataclass(frozen=True)
class DynamicK(TopK):
    """Every expert whose score is at least 1 - tau of the token's largest, at most --top-k of them; each with weight 1.

    For experts that split a block. The scores stand for the sizes of the experts' outputs: fit them, with data and
    ``init`` ``auto`` or ``regress``. ``tau`` 0 takes the largest alone, 1 all with a positive score. The other options
    are those of ``topk``.
    """

    name: ClassVar[str] = "dynamic-k"

    tau: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau <= 1:
            raise BadOption(f"dynamic-k.tau is {self.tau}: it must be between 0 and 1")
        if self.init == "classify":
            raise BadOption(
                "dynamic-k.init is 'classify', which fits an order of experts and not their sizes", hint="use regress"
            )

    def leaves_out(self, top_k: int, num_experts: int) -> bool:
        return True

    def choose(self, scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """``S = {i: s_i >= (1 - tau) max s}``, the first k of them; ``g = 1``.

        Szatkowski et al. (D2DMoE), arXiv 2310.04361, where s predicts the norm of each expert's output.
        """
        values_TK, experts_TK = highest(scores_TE, top_k)
        largest_T1 = first(values_TK, 1)
        # Fitted scores may all be negative: the largest stays.
        least_T1 = torch.minimum(largest_T1 * (1 - self.tau), largest_T1)
        kept_TK = values_TK >= least_T1
        return without_expert(experts_TK, torch.ones_like(values_TK), kept_TK, scores_TE.shape[1])
