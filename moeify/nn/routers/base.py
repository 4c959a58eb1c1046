"""What a router is: a module that gives each token its experts and their weights, and the options that build it.

The module is the only definition. Module form uses it as it is; graph form inlines the ATen graph it traces to, so
whatever a router does must export with a dynamic number of tokens and stay ordinary ATen ops (or ``moe.*`` ops with a
train flag).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moeify.errors import BadOption
from moeify.ir.block import Block
from moeify.ir.weights import WeightRecipe
from moeify.registry import render


class Router(nn.Module):
    """``forward(x_TD, token_ids_T=None) -> (experts_TK int64, weights_TK in x's dtype)``."""

    num_experts: int
    top_k: int

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        """Draw the initial values; consecutive groups of ``repeat`` experts get the same row."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own


@dataclass(frozen=True)
class Units:
    """The hidden units of the experts of a split: ``find()`` gives them, [num_experts, width], the unit that stands for
    the expert first. It may take seconds, so it is called when a weight is computed and not before.
    """

    num_experts: int
    width: int
    find: Callable[[], Tensor]


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

    def gates_are_one(self, top_k: int) -> bool:
        """Whether every chosen expert has the weight 1: what makes a split with all experts on exact."""
        return self.gates_sum_to_one and top_k == 1

    def for_block(self, block: Block) -> RouterSpec:
        """The options with what they need of the block filled in: its activation, which biases it has. Raises Refused
        for a block whose experts this router cannot choose."""
        return self

    def recipes(self, block: Block, units: Units | None, dtype: torch.dtype) -> list[WeightRecipe]:
        """Parameters, named ``{anchor}.router.*``, that start from the block's own weights; ``reset`` draws the others.

        ``units`` is None where experts are no parts of the block. Raises Refused or BadOption where the start cannot be
        made.
        """
        return []

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        """An uninitialised router. Raises BadRecipe when the options do not fit (switch with top_k 2, ...)."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def __str__(self) -> str:
        return render(self)
