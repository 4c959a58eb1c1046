"""THOR's consistency loss: experts that were drawn at random say the same."""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.errors import UsageError


def consistency(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """``mean_t (KL(p_t || q_t) + KL(q_t || p_t)) / 2``, p and q the softmax over the last axis of the scores [..., C]
    of two forward passes; in nats, float32 or better, with a gradient to both.

        first, second = model(x), model(x)  # the `random` router draws experts for each pass
        loss = F.cross_entropy(first, y) + F.cross_entropy(second, y) + 5 * consistency(first, second)

    ``mask``, of the scores' shape without the last axis, is 0 where a token does not count. Zero where none counts.
    ``moeify.losses`` knows the last pass alone. Raises UsageError for passes or a mask of other shapes.

    Zuo et al., Taming Sparsely Activated Transformer with Stochastic Experts, arXiv 2110.04260, whose code
    weighs it by 1 or 5.
    """
    total, count = divergences(first, second, mask)
    return total / count.clamp_min(1)


def divergences(first: Tensor, second: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of ``consistency`` over the tokens that count, and how many there are."""
    if first.shape != second.shape:
        raise UsageError(f"the two passes gave scores of shapes {list(first.shape)} and {list(second.shape)}")
    if mask is not None and mask.shape != first.shape[:-1]:
        raise UsageError(f"the mask is {list(mask.shape)} and the scores are of {list(first.shape[:-1])} tokens")
    kind = torch.promote_types(first.dtype, torch.float32)
    p, q = first.to(kind).log_softmax(-1), second.to(kind).log_softmax(-1)
    # Both divergences together: sum_c (p_c - q_c) (log p_c - log q_c).
    each = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2
    counted = torch.ones_like(each) if mask is None else (mask != 0).to(kind)
    return (each * counted).sum(), counted.sum()
