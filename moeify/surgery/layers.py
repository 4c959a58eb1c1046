"""The layers that take the place of a block: ``Owned`` for a whole submodule, ``Enter`` for the up layer of a
carrier.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moeify.errors import Refused
from moeify.nn.moe import MoE
from moeify.surgery.slot import Slot, Stand
from moeify.surgery.token_ids import TokenIds


class Placed(MoE):
    """A MoE that knows where it stands: the anchor of its block, and the model's token ids where its router reads
    them.
    """

    anchor: str
    token_ids: TokenIds | None = None

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """The mixture's output for x ``[..., D]`` or, with layout channels-first, ``[N, D, *spatial]``."""
        if self.token_ids is None:
            return super().forward(x)
        return super().forward(x, self.token_ids.for_rows(x, self.anchor))


class Owned(Placed):
    """In place of a submodule that held one block and nothing else; ``output_dropout`` is what the submodule ended
    with.
    """

    output_dropout: float = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes what the submodule took: one tensor, by position or by whatever name it had."""
        given = [*args, *kwargs.values()]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        if len(tensors) != 1 or any(value is not None and value is not tensors[0] for value in given):
            raise Refused(
                f"the converted block is called with {len(given)} arguments instead of one tensor",
                where=self.anchor,
                hint="use the graph form: moeify.convert(model, form='graph')",
            )
        return F.dropout(self.mix(tensors[0]), self.output_dropout, self.training)


class Enter(Placed, Stand):
    """In place of the up layer of a carrier: computes the mixture, parks it for ``Leave``, returns a stretched zero.

    The model's own activation and dropout then work on that zero; what they make of it does not matter. With gate and
    up fused in one layer the zero has the width of both.
    """

    slot: Slot

    def stand_for(self, layer: nn.Module, channels: int, slot: Slot) -> None:
        self._stand_for(layer, channels)
        self.slot = slot

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.slot.park(self.mix(x.movedim(self.channels, -1)))
        return self._stretched_zero(x)
