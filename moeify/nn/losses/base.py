"""What a router loss is: a function of what a router did with T tokens, a name, and a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption
from moeify.registry import render

Total = Callable[[Tensor], Tensor]  # a sum over this process's tokens -> the sum over those of all ranks


def here(x: Tensor) -> Tensor:
    """``Total`` of one process."""
    return x


@dataclass(frozen=True)
class Routed:
    """What one block's router did with T tokens, all calls of the forward together.

    ``values`` are those of ``Router.observe``, and ``inputs`` [T, D], the rows it saw. ``reward`` [T] is what the model
    earned for each token, where the caller has given it. ``total`` sums over ranks.
    """

    values: Mapping[str, Tensor]
    num_experts: int
    reward: Tensor | None = None
    total: Total = here


@dataclass(frozen=True)
class RouterLoss:
    """A loss with its options; ``weight`` is its coefficient in the sum."""

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()  # the values of a router without which there is no such loss
    needs_reward: ClassVar[bool] = False
    over_pairs: ClassVar[bool] = False  # whether it looks at pairs of tokens, which may be on different ranks

    weight: float = 1.0

    def __post_init__(self) -> None:
        for option, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise BadOption(
                    f"the {self.name} loss's {option.replace('_', '-')} is {value}: it must be a finite number of at "
                    "least 0"
                )

    @property
    def adapts(self) -> bool:
        """Whether its coefficient, weight times a factor, is changed after each step."""
        return False

    @property
    def first_factor(self) -> float:
        return 1.0

    def next_factor(self, factor: float, routed: Sequence[Routed]) -> float:
        """The factor of the next step; ``routed`` are the blocks that have this loss."""
        return factor

    def of(self, routed: Routed) -> Tensor:
        """The loss before its weight: one number in float32 or better, 0 where there are no tokens."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def __str__(self) -> str:
        return render(self)


def precise(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def divided(x: Tensor, by: Tensor) -> Tensor:
    """x / by; 0 where both are, as for no tokens."""
    return x / by.clamp_min(torch.finfo(x.dtype).tiny)


def rows(x: Tensor) -> Tensor:
    """The number of rows, as a tensor that can be summed over ranks."""
    return torch.tensor(float(len(x)), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def counts(experts_TK: Tensor, num_experts: int) -> Tensor:
    """How many slots each expert has, [E] float32; a slot without an expert, number E, is nobody's."""
    return torch.bincount(experts_TK.flatten(), minlength=num_experts)[:num_experts].float()


def shares(probabilities_TE: Tensor) -> Tensor:
    """Each row over its sum, in float32 or better: sigmoid and ReLU scores do not sum to 1, and those of a softmax stay
    as they are (DeepSeek-V3, arXiv 2412.19437, equation 19).
    """
    p_TE = precise(probabilities_TE)
    return divided(p_TE, p_TE.sum(1, keepdim=True))


def squared_variation(x_E: Tensor) -> Tensor:
    """CV(x)^2, the variance of all E values over their squared mean."""
    return divided(x_E.var(correction=0), x_E.mean().square())
