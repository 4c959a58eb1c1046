"""Small models with mixtures, for tests of what training adds to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moeify

D = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks over tokens [batch, sequence, D]; ``order`` names the block of each layer."""

    def __init__(self, order: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in set(order)])
        self.order = order
        self.saves_memory: bool | None = None  # use_reentrant of a checkpoint around each layer

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            block = self.blocks[number]
            if self.saves_memory is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.saves_memory)
        return x


def tokens(batch: int = 3, sequence: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, sequence, D, generator=torch.Generator().manual_seed(seed))


def converted(form: str = "module", order: tuple[int, ...] = (0, 1), **fields: object) -> nn.Module:
    """Of the same dense weights each time, in training mode."""
    torch.manual_seed(1)
    recipe = moeify.Recipe(**{"experts": 4, "top_k": 2, **fields})  # type: ignore[arg-type]
    dense = Stack(order)
    sample = (tokens(),) if form == "module" else ["x=float32[batch=3,seq=5,8]"]
    return moeify.convert(dense, recipe, inputs=sample, form=form).train()
