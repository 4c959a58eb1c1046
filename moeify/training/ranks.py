"""Sums over tokens that are sums over the tokens of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moeify.nn.losses.base import Total

Group = Any  # a torch.distributed process group


def total_over(group: Group) -> Total:
    """``Total`` over a process group whose ranks average their gradients."""

    def all_reduce(x: Tensor) -> Tensor:
        dist.all_reduce(x, group=group)
        return x

    return averaged(all_reduce, dist.get_world_size(group))


def averaged(all_reduce: Callable[[Tensor], Tensor], ranks: int) -> Total:
    """``Total`` where gradients are averaged over the ranks afterwards.

    The value is the sum over the ranks, the same on each. The gradient with regard to a rank's own part is 1; averaging
    divides by the ranks, so it is sent back times their number.
    """

    def total(x: Tensor) -> Tensor:
        value = all_reduce(x.detach().clone())
        if not x.requires_grad:
            return value
        return x * ranks + (value - x.detach() * ranks)

    return total
