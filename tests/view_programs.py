"""Small captured programs for the tests of the printer, the views and the command line."""

from __future__ import annotations

import functools

import torch
from torch import nn

from moeify.ir.program import InputSpec, Program


class Layer(nn.Module):
    def __init__(self, width: int = 4, hidden: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """A projection, ``depth`` equal layers, a head; with ``shared`` one layer is called ``depth`` times."""

    def __init__(self, depth: int, *, shared: bool = False, odd: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList(Layer(hidden=16 if i == odd else 8) for i in range(1 if shared else depth))
        self.head = nn.Linear(4, 2)
        self.depth = depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for i in range(self.depth):
            h = self.layers[i % len(self.layers)](h)
        batch, seq = h.shape[:2]
        return self.head(h.reshape(batch * seq, 4))


def stack(depth: int, *, shared: bool = False, odd: int | None = None) -> Program:
    """A captured Stack with inputs ``x=float32[batch, seq, 3]``."""
    return _captured(depth, shared, odd).clone()


@functools.cache
def _captured(depth: int, shared: bool, odd: int | None) -> Program:
    x = torch.randn(2, 5, 3)
    dims = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(Stack(depth, shared=shared, odd=odd).eval(), (x,), dynamic_shapes=dims, strict=False)
    spec = InputSpec("x", torch.float32, ("batch", "seq", 3))
    return Program(exported.module(check_guards=False), (spec,), (x,))  # type: ignore[arg-type]
