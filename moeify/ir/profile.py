"""What a model's own data say about the hidden units of its dense blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockProfile:
    """Statistics of one block's hidden value h [F], which is what its down projection reads.

    All calls of the block count. Means are over all ``tokens`` rows, accumulated in float64 and kept in float32.
    """

    tokens: int  # rows seen
    mean_F: Tensor
    mean_abs_F: Tensor
    mean_square_F: Tensor
    active_F: Tensor  # share of rows in which h is not zero
    firing_F: Tensor  # share of rows in which |h_n| > 0 is among the `Profile.top` largest: mu of arXiv 2502.04416
    importance_F: Tensor | None  # mean |h_n dL/dh_n| (arXiv 2406.16554), where gradients were asked for
    inputs_ND: Tensor  # a seeded sample of the rows of the block's input x, in random order, float32
    top_quarter: float | None = None  # share of squared |h| in each row's top 25 % of units, mean over rows

    @property
    def units(self) -> int:
        return self.mean_F.shape[0]


@dataclass(frozen=True)
class Profile:
    """What running a program on data gave: statistics by ``Block.anchor``, and the data themselves.

    ``batches`` are the inputs that were run, in order. ``top`` is A of ``firing_F``. ``facts`` say in text where it
    comes from: ``source``, ``sha256`` of the model's parameters, ``seed``, ``tokens``, ``loss``, ``moeify``.
    """

    blocks: Mapping[str, BlockProfile]
    batches: list[tuple[Tensor, ...]]
    top: int
    facts: Mapping[str, str]
