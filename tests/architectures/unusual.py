"""Rarer surroundings of a feed-forward block, and neighbours that only look like one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.blocks import D, H, Plain, Residual, _tokens
from tests.architectures.kinds import Architecture, Blocks

Join = Callable[["Joined", Tensor, Tensor], Tensor]


class Joined(nn.Module):
    """Two layers whose residual is ``join``; the last one's result is the model's output."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain(F.gelu) for _ in range(2))
        self.norm, self.gate, self.scale, self.join = (
            nn.LayerNorm(D),
            nn.Linear(D, D),
            nn.Parameter(torch.ones(D)),
            join,
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.join(self, x, block(self.norm(x)))
        return x


def _highway(model: Joined, x: Tensor, y: Tensor) -> Tensor:
    open_ = torch.sigmoid(model.gate(x))
    return y * open_ + x * (1 - open_)


class ChannelMix(nn.Module):
    """RWKV: the block reads a mixture with the token before, and another layer gates its result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)
        self.gate, self.mix = nn.Linear(D, D, bias=False), nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        mixed = x * self.mix + before * (1 - self.mix)
        return torch.sigmoid(self.gate(mixed)) * self.down(F.relu(self.up(mixed)).square())


class Tied(nn.Module):
    """The down layer is the up layer transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H, D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.weight)), self.weight.t())


class SingleStream(nn.Module):
    """One layer into attention and the hidden value, one layer out of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, 3 * D + H), nn.Linear(D + H, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, h = self.first(x).split([D, D, D, H], -1)
        return self.last(torch.cat([F.scaled_dot_product_attention(q, k, v), F.gelu(h)], -1))


class MixFfn(nn.Module):
    """A depthwise convolution over the tokens inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(D, H), nn.Linear(H, D), nn.Conv1d(H, H, 3, padding=1, groups=H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.mix(self.up(x).transpose(1, 2)).transpose(1, 2)))


class SpatialGate(nn.Module):
    """gMLP: one half of the hidden value is mixed over the tokens and gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(D, 2 * H), nn.Linear(H, D), nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(x)).chunk(2, -1)
        return self.down(u * self.mix(v))


class Positional(nn.Module):
    """Every position has a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(D, H), nn.Linear(H, D), nn.Parameter(torch.rand(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * self.scale)


class ThreeLayers(nn.Module):
    """A residual around three layers; it is added after them, so that its node comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(F.relu(self.second(F.relu(self.first(x)))))
        return y + 0.5 * x


class Region(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.inner(x)


def _joined(name: str, join: Join) -> Architecture:
    return Architecture(name, lambda: Joined(join), _tokens, (Blocks("blocks.?", 2, "gelu", H),))


def _refused(name: str, make: Callable[[], nn.Module], path: str, reason: str) -> Architecture:
    return Architecture(name, lambda: Residual(make), _tokens, refused=((path, reason),), fixed=True)


ALL = (
    _joined("residual scaled (DeepNorm)", lambda m, x, y: m.norm(2 * x + y)),
    _joined("residual scaled, added second", lambda m, x, y: m.norm(y + x * m.scale)),
    _joined("residual in a wider type", lambda m, x, y: (x.double() + y.double()).float()),
    _joined("residual with dropout", lambda m, x, y: F.dropout(x, 0.1, m.training) + y),
    _joined("residual by addcmul", lambda m, x, y: torch.addcmul(x, y, m.scale)),
    _joined("residual by lerp", lambda m, x, y: torch.lerp(x, y, 0.5)),
    _joined("residual subtracted from", lambda m, x, y: x - y),
    _joined("highway", _highway),
    Architecture(
        "RWKV channel mix", lambda: Residual(ChannelMix), _tokens, (Blocks("blocks.?", 2, "relu2", H),), fixed=True
    ),
    Architecture("tied weights", lambda: Residual(Tied), _tokens, (Blocks("blocks.?", 2, "gelu", H),)),
    _refused("attention and hidden value in one layer", SingleStream, "blocks.?", "an attention output projection"),
    _refused("depthwise convolution inside", MixFfn, "blocks.?.down", "a convolution (conv1d) stands between"),
    _refused("spatial gate", SpatialGate, "blocks.?", "the two layers above it read different tensors"),
    _refused("a scale for every position", Positional, "blocks.?", "mul treats rows differently"),
    Architecture(
        "scaled residual around three layers",
        ThreeLayers,
        _tokens,
        refused=(("", "a chain of more than two linear layers"),),
    ),
    _refused("an autocast region", Region, "blocks.?*", "which is not searched"),
)
