"""How many tokens an expert takes, and which come first."""

from __future__ import annotations

import torch
from torch import Tensor


def capacity(column_T1: Tensor, factor: float, num_experts: int) -> Tensor:
    """ceil(T * factor / E) as a tensor, T the number of entries: it stays symbolic in an exported graph."""
    tokens = torch.ones_like(column_T1, dtype=torch.float64).sum()
    return torch.ceil(tokens * factor / num_experts)


def rank(experts_N: Tensor) -> Tensor:
    """How many earlier entries are the same expert.

    A stable sort by expert puts the entries of one expert side by side in their order, so an entry's rank is its place
    minus the place where its expert begins. The usual cumulative sum over an [N, E] mask costs E times the memory.
    """
    sorted_N, order_N = torch.sort(experts_N, stable=True)
    begin_N = torch.searchsorted(sorted_N, sorted_N)
    place_N = torch.ones_like(order_N).cumsum(0) - 1
    return torch.zeros_like(order_N).scatter(0, order_N, place_N - begin_N)
