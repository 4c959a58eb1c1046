"""What a router is: a module that gives each token its experts and their weights, and the options that build it.

The module is the only definition. Module form uses it as it is; graph form inlines the ATen graph it traces to, so
whatever a router does must export with a dynamic number of tokens and stay ordinary ATen ops (or ``moe.*`` ops with a
train flag).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from moeify.errors import BadOption
from moeify.registry import render


class Router(nn.Module):
    """``forward(x_TD, token_ids_T=None) -> (experts_TK int64, weights_TK in x's dtype)``."""

    num_experts: int
    top_k: int

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        """Draw the initial values; consecutive groups of ``repeat`` experts get the same row."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own


@dataclass(frozen=True)
class RouterSpec:
    """A router's options, and what the compiler must know about it."""

    name: ClassVar[str] = ""
    mixes_tokens: ClassVar[bool] = False  # a token's experts depend on other tokens
    needs_token_ids: ClassVar[bool] = False

    def _check_at_least_zero(self, option: str, hint: str | None = None) -> None:
        value = getattr(self, option)
        if not 0 <= value < math.inf:
            what = f"{self.name}.{option.replace('_', '-')} is {value}: it must be a finite number of at least 0"
            raise BadOption(what, hint=hint)

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the weights of every token sum to 1: what makes `copy` exact."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        """An uninitialised router. Raises BadRecipe when the options do not fit (switch with top_k 2, ...)."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def __str__(self) -> str:
        return render(self)
