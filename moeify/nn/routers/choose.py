"""What several routers share: which experts have the highest scores, and in which precision gates are computed."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)


def highest(scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``(values_TK, experts_TK)`` of the highest scores, best first; among equal scores the lower expert wins.

    torch.topk promises nothing about equal scores, and they are common here: the shards of one granular copy
    start with equal rows and must be chosen together, and a router whose weights are zero scores every expert alike.
    """
    values, order = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
    return first(values, top_k), first(order, top_k)


def places(scores: Tensor, dim: int) -> Tensor:
    """The place of every entry in the order of its axis, 0 for the highest; among equal ones the first comes first."""
    order = torch.sort(scores, dim=dim, descending=True, stable=True).indices
    return torch.sort(order, dim=dim).indices


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis in float32 or better, so that half-precision models get gates that sum to 1."""
    half = logits.dtype in _HALVES
    return torch.softmax(logits, dim=-1, dtype=torch.float32 if half else None)


def softmax_of_highest(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """``(experts_TK, weights_TK)``: the k most probable experts by ``p = softmax(logits)``, weighted by p over the sum
    of those chosen, or by p as it is.
    """
    if renormalise:
        # The softmax over the chosen logits is p / sum over S of p, without the division.
        values_TK, experts_TK = highest(logits_TE, top_k)
        return experts_TK, softmax(values_TK)
    weights_TK, experts_TK = highest(softmax(logits_TE), top_k)
    return experts_TK, weights_TK


def wide(value: Tensor) -> Tensor:
    """In float32 or better; no node in the traced graph when it is that already."""
    return value.float() if value.dtype in _HALVES else value


def scaled(weights: Tensor, scale: float) -> Tensor:
    """Times ``scale``; 0 leaves them."""
    return weights if scale in (0, 1) else weights * scale


def first(sorted_TE: Tensor, top_k: int) -> Tensor:
    """The first entries along the last axis. ``sorted[:, :top_k]`` would trace to two slices."""
    return torch.ops.aten.slice.Tensor(sorted_TE, sorted_TE.dim() - 1, 0, top_k)


def like(gates: Tensor, x: Tensor) -> Tensor:
    """The gates in x's dtype; no node in the traced graph when they have it already."""
    return gates if gates.dtype == x.dtype else gates.to(x.dtype)


def repeated_normal(
    shape: tuple[int, int], std: float, generator: torch.Generator, repeat: int, like: Tensor
) -> Tensor:
    """N(0, std^2) of a shape [E, D] whose rows are equal in consecutive groups of ``repeat``."""
    rows = torch.randn(shape[0] // repeat, shape[1], generator=generator).mul_(std)
    return rows.repeat_interleave(repeat, dim=0).to(like)
