"""What most routers are made of: a score for every expert that is linear in the token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.nn.routers.choose import like, repeated_normal
from moeify.nn.routers.router import Router


class LinearRouter(Router):
    """Scores ``W x``; W is ``weight`` [E, D], drawn from N(0, std^2).

    ``precise`` keeps the weight, and computes the scores, in float32 or better whatever the model's type.
    """

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, std: float, dtype: torch.dtype, *, precise: bool = False
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.std = num_experts, top_k, std
        kind = torch.promote_types(dtype, torch.float32) if precise else dtype
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, dtype=kind))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        shape = (self.num_experts, self.weight.shape[1])
        with torch.no_grad():
            self.weight.copy_(repeated_normal(shape, self.std, generator, repeat, self.weight))

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E]."""
        return F.linear(like(x_TD, self.weight), self.weight)
