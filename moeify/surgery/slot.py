"""What the two halves of a carrier share, and the halves without weights: ``Skip`` and ``Leave``.

A carrier is a block whose up and down layers are called by code that also does other things (BertLayer,
OPTDecoderLayer, nn.TransformerEncoderLayer). Nothing but the layers can be replaced, so the up layer becomes
``Enter``, which computes the whole mixture and parks the result, and the down layer becomes ``Leave``, which returns
it. What flows between them, through the model's own activation and dropout, is a stretched zero that takes no memory
and is thrown away.

Not thread-safe: two threads that run one model at the same time would mix their results (nn.DataParallel does that).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moeify.errors import Refused


class Slot:
    """Holds one result, features last, between an ``Enter`` and its ``Leave``; empty in a copy or a pickle."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        self.grad_mode = False

    def park(self, value: torch.Tensor) -> None:
        """Keep a result. One that nobody fetched (the call before was broken off) is dropped."""
        self.value = value
        self.grad_mode = torch.is_grad_enabled()

    def fetch(self, where: str) -> torch.Tensor:
        """Give the result and forget it. Raises Refused when it cannot be the right one."""
        value, self.value = self.value, None
        if value is None:
            raise Refused(
                "the down layer of a converted block is called without its up layer",
                where=where,
                hint="use the graph form: moeify.convert(model, form='graph')",
            )
        if self.grad_mode != torch.is_grad_enabled():
            # Reentrant checkpointing of one half alone: the parked result would silently carry no gradient.
            raise Refused(
                "the two layers of a converted block run under different gradient modes",
                where=where,
                hint="checkpoint the whole layer, or use non-reentrant checkpointing",
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None, "grad_mode": False}


class Stand(nn.Module):
    """A module in the place of a linear layer: the attributes that other code reads of it, and no parameters.

    ``out_features`` and ``in_features`` are those of the layer that stood there. ``channels`` is the axis of the
    features: -1, or negative and further left for a convolution.
    """

    in_features: int
    out_features: int
    channels: int
    like: torch.Tensor  # gives dtype and device: T5 casts to wo.weight.dtype

    def _stand_for(self, layer: nn.Module, channels: int) -> None:
        self.in_features, self.out_features = features(layer)
        self.channels = channels
        self.training = layer.training
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False)
        self._weight_shape = tuple(weight.shape)
        self._has_bias = getattr(layer, "bias", None) is not None

    @property
    def weight(self) -> torch.Tensor:
        """Zeros of the shape, dtype and device of the weight that stood here."""
        return self.like.new_zeros(()).expand(self._weight_shape)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.like.new_zeros(()).expand(self.out_features) if self._has_bias else None

    def _stretched_zero(self, x: torch.Tensor) -> torch.Tensor:
        shape = list(x.shape)
        shape[self.channels] = self.out_features
        return x.new_zeros(()).expand(shape)


class Skip(Stand):
    """In place of the second up layer (the gate): nothing to compute."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self._stand_for(layer, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._stretched_zero(x)


class Leave(Stand):
    """In place of the down layer: returns what ``Enter`` parked."""

    def __init__(self, layer: nn.Module, channels: int, slot: Slot, where: str) -> None:
        super().__init__()
        self._stand_for(layer, channels)
        self.slot = slot
        self.where = where

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        y = self.slot.fetch(self.where)
        rows = h.movedim(self.channels, -1).shape[:-1]
        # Between the two layers the model may merge or split the axes of its tokens.
        y = y if y.shape[:-1] == rows else y.reshape(*rows, self.out_features)
        return y.movedim(-1, self.channels)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, a 1x1 convolution or GPT-2's Conv1D."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    outs, ins = weight.shape[0], weight.shape[1]
    return (outs, ins) if stores_transposed(layer) else (ins, outs)


def stores_transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored [in, out]: transformers' Conv1D, told by its ``nf``."""
    return hasattr(layer, "nf") and not hasattr(layer, "out_features")
