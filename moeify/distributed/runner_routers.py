"""Router losses and updates of a run, over the tokens of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.distributed.runner_group import Ranks
from moeify.training import steps
from moeify.training.losses import RouterLosses, over_ranks
from moeify.training.ranks import averaged
from moeify.training.watch import find


@dataclass(frozen=True)
class Routers:
    """Of an observed module. ``masks`` gives the input that says which tokens of a block are no padding, by the block's
    path.

    Every sum over tokens that a loss or an update takes (f_i, P_i, loads) is over the tokens of all ranks, without
    padding and without those of a rank that only keeps the others company. So a step is that of one process on the
    whole batch.
    """

    module: nn.Module
    ranks: Ranks
    masks: Mapping[str, str]

    def losses(self, batch: Mapping[str, Tensor], counted: int) -> RouterLosses | None:
        """Of the last forward pass; None where the recipe names none. Every rank calls it."""
        watch = find(self.module)
        if watch is None or not any(facts.losses for facts in watch.facts.values()):
            return None
        return over_ranks(self.module, None, self._masks(batch, counted), None, self._total)

    def after_step(self, batch: Mapping[str, Tensor], counted: int) -> None:
        """Every rank calls it, after its optimiser's step."""
        if find(self.module) is not None:
            steps.after(self.module, self._masks(batch, counted), self._total)

    def _masks(self, batch: Mapping[str, Tensor], counted: int) -> Tensor | dict[str, Tensor]:
        if not counted:
            return torch.zeros(1)
        return {path: batch[name] for path, name in self.masks.items()}

    def _total(self, x: Tensor) -> Tensor:
        return averaged(lambda part: self.ranks.everyone.all_reduce(part, "router losses"), self.ranks.size)(x)
