"""Token ids for routers that read them: taken where the embedding reads them, parked until the layers ask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moeify.errors import Refused


class TokenIds:
    """The ids of the forward pass that is under way. One object per model, shared by its layers; empty in a copy or
    pickle.
    """

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def for_rows(self, x: torch.Tensor, where: str) -> torch.Tensor:
        """The ids of the tokens of x ``[..., D]``. Raises Refused when none, or those of other tokens, are there."""
        ids = self.value
        if ids is None:
            raise Refused(
                "the hash router needs token ids, and the embedding has read none in this call",
                where=where,
                hint="call the model with token ids, not with embeddings",
            )
        if ids.numel() != x[..., 0].numel():
            raise Refused(
                f"the hash router has ids of {ids.numel()} tokens and this layer gets {x[..., 0].numel()}", where=where
            )
        return ids

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None}


class Tap:
    """Forward pre-hook of an embedding: parks its input."""

    def __init__(self, holder: TokenIds) -> None:
        self.holder = holder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.holder.value = args[0] if args else kwargs["input"]


class Clear:
    """Forward pre-hook of the whole model: the ids of the call before must not be taken for this one's."""

    def __init__(self, holder: TokenIds) -> None:
        self.holder = holder

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.holder.value = None


def tap(model: nn.Module, embedding: str) -> TokenIds:
    """Put the hooks in; gives the holder."""
    holder = TokenIds()
    model.register_forward_pre_hook(Clear(holder))
    model.get_submodule(embedding).register_forward_pre_hook(Tap(holder), with_kwargs=True)
    return holder
