"""What a router is: a module that gives each token its experts and their weights, and the options that build it.

The module is the only definition. Module form uses it as it is; graph form inlines the ATen graph it traces to, so
whatever a router does must export with a dynamic number of tokens and stay ordinary ATen ops (or ``moe.*`` ops with a
train flag).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moeify.errors import BadOption, BadRecipe
from moeify.ir.block import Block
from moeify.ir.weights import WeightRecipe
from moeify.registry import render


class Router(nn.Module):
    """``forward(x_TD, token_ids_T=None) -> (experts_TK int64, weights_TK in x's dtype)``.

    A token may have fewer than K experts: a slot without one holds the number ``num_experts`` and the weight 0 (see
    ``moeify.ir.no_expert``), and costs no work.

    What losses need of a call leaves by ``observe``, where ``observer`` is set (by ``moeify.nn.observation``):

    | value | shape | what it is |
    |---|---|---|
    | ``logits`` | [T, E] | the scores before any function that makes weights of them; with noise, where there is some |
    | ``probabilities`` | [T, E] | the weights that all experts would have, float32 or better |
    | ``experts`` | [T, K] | the choice, before a capacity drops anything of it |
    | ``weights`` | [T, K] | the weights that ``forward`` gives |
    | ``clean``, ``deviation`` | [T, E] | ``noisy-topk``: the logits without noise, and the size of the noise |
    | ``baseline`` | [T] | ``rl``: the reward that is expected of a token |

    They hang on the autograd graph. A router without scores (``hash``) leaves experts and weights alone.
    """

    num_experts: int
    top_k: int
    observer: Callable[[Mapping[str, Tensor]], None] | None = None

    def observe(self, **values: Tensor) -> None:
        """Hand the values of a call to the observer; nothing where there is none, so that no graph holds them."""
        if self.observer is not None:
            self.observer(values)

    def after_step(self, values: Mapping[str, Tensor], total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Change what no gradient changes (``sigmoid-bias``: its biases), after a training step; ``values`` are those
        of one call of it, and ``total`` sums over the ranks that train together. Most routers have nothing of the kind.
        """

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
    mixes_tokens: ClassVar[str] = ""  # when a token's experts depend on those after it: "always" or "in training"
    needs_token_ids: ClassVar[bool] = False

    def _check_at_least_zero(self, option: str, hint: str | None = None) -> None:
        value = getattr(self, option)
        if not 0 <= value < math.inf:
            what = f"{self.name}.{option.replace('_', '-')} is {value}: it must be a finite number of at least 0"
            raise BadOption(what, hint=hint)

    def _check_positive(self, option: str) -> None:
        value = getattr(self, option)
        if not 0 < value < math.inf:
            raise BadOption(f"{self.name}.{option.replace('_', '-')} is {value}: it must be finite and above 0")

    def _check_choice(self, option: str, choices: Sequence[str]) -> None:
        value = getattr(self, option)
        if value not in choices:
            hint = f"choose one of {', '.join(choices)}"
            raise BadOption(f"{self.name}.{option.replace('_', '-')} is {value!r}", hint=hint)

    def _check_top_k(self, top_k: int, wanted: int) -> None:
        if top_k != wanted:
            what = {1: "one expert", 2: "two experts"}.get(wanted, f"all {wanted} experts")
            raise BadRecipe(f"the {self.name} router chooses {what} per token, not {top_k}", hint=f"--top-k {wanted}")

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the weights of every token sum to 1: what makes `copy` exact."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def gates_are_one(self, top_k: int) -> bool:
        """Whether every chosen expert has the weight 1: what makes a split with all experts on exact."""
        return self.gates_sum_to_one and top_k == 1

    def leaves_out(self, top_k: int, num_experts: int) -> bool:
        """Whether a token may go without some of the experts."""
        return top_k < num_experts

    @property
    def fit(self) -> str | None:
        """``regress`` or ``classify`` where the scores must be fitted on data."""
        return None

    @property
    def fit_with_data(self) -> str | None:
        """The same for what makes use of data where there are some. The router then is a ``TopKRouter``."""
        return self.fit

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

    def _check_no_shards(self, repeat: int) -> None:
        if repeat > 1:
            raise BadRecipe(
                f"the {self.name} router may choose some shards of a granular copy without the others",
                hint="use softmax-topk, or another method",
            )

    def __str__(self) -> str:
        return render(self)


@dataclass(frozen=True)
class MixingSpec(RouterSpec):
    """Options of a router that looks at all tokens of a call at once.

    ``allow_causal`` lets it into an autoregressive decoder, which it is kept out of otherwise: a token's experts would
    tell of the tokens after it, and generation, which has none yet, would choose others.
    """

    allow_causal: bool = False
