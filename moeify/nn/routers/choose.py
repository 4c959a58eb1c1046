"""What several routers share: which experts have the highest scores, and in which precision gates are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def highest(scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``(values_TK, experts_TK)`` of the highest scores, best first; among equal scores the lower expert wins.

    torch.topk promises nothing about equal scores, and they are common here: the shards of one granular copy
    start with equal rows and must be chosen together, and a router whose weights are zero scores every expert alike.
    """
    values, order = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
    # values[:, :top_k] would trace to two slices each.
    first = torch.ops.aten.slice.Tensor
    return first(values, 1, 0, top_k), first(order, 1, 0, top_k)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis in float32 or better, so that half-precision models get gates that sum to 1."""
    half = logits.dtype in (torch.float16, torch.bfloat16)
    return torch.softmax(logits, dim=-1, dtype=torch.float32 if half else None)


def like(gates: Tensor, x: Tensor) -> Tensor:
    """The gates in x's dtype; no node in the traced graph when they have it already."""
    return gates if gates.dtype == x.dtype else gates.to(x.dtype)


def repeated_normal(
    shape: tuple[int, int], std: float, generator: torch.Generator, repeat: int, like: Tensor
) -> Tensor:
    """N(0, std^2) of a shape [E, D] whose rows are equal in consecutive groups of ``repeat``."""
    rows = torch.randn(shape[0] // repeat, shape[1], generator=generator).mul_(std)
    return rows.repeat_interleave(repeat, dim=0).to(like)
