"""Models with no feed-forward block, or with one that may not be taken, and the reason that must be given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.architectures.blocks import D, H, Plain, Residual, _tokens
from tests.architectures.kinds import Architecture, floats, ids


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, D, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        s = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = x * s.sigmoid()
        return self.head(x.mean((2, 3)))


class ReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(D, H), nn.Linear(H, D), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.up(x))
        return x + self.down(h), self.other(h)


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.up(x))
        return x + self.down(h), h


class Adapted(nn.Module):
    """Low-rank adapters on the up layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x) + 0.5 * self.b(self.a(x))))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e1, self.e2, self.e3 = nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 4)
        self.d1, self.d2, self.d3 = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.e1(x))
        b = F.relu(self.e2(a))
        c = F.relu(self.d1(self.e3(b))) + b
        return self.d3(F.relu(self.d2(c)) + a)


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mean, self.spread = nn.Linear(16, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.dec1, self.dec2 = nn.Linear(4, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.enc(x))
        mean, spread = self.mean(h), self.spread(h)
        z = mean + torch.randn_like(mean) * (0.5 * spread).exp()
        return torch.sigmoid(self.dec2(F.relu(self.dec1(z)))), mean, spread


class Bottleneck(nn.Module):
    """A residual block of ResNet with 1x1, 3x3 and 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, padding=1)
        self.c1, self.c2, self.c3 = nn.Conv2d(D, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, D, 1)
        self.n1, self.n2, self.n3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(D)
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.n1(self.c1(x)))
        y = F.relu(self.n2(self.c2(y)))
        x = F.relu(x + self.n3(self.c3(y)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class BatchNormInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, padding=1)
        self.up, self.norm, self.down = nn.Conv2d(D, H, 1), nn.BatchNorm2d(H), nn.Conv2d(H, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.down(F.relu(self.norm(self.up(x))))


class GruLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.head = (
            nn.Embedding(64, D),
            nn.GRU(D, D, batch_first=True),
            nn.Linear(D, 64),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(input_ids))[0])


class Broadcast(nn.Module):
    """Global context: one vector per example, added to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.mean(1, keepdim=True))


class RowMixing(nn.Module):
    """A softmax over the tokens inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h * h.mean(1, keepdim=True))


def _normed() -> nn.Module:
    block = Plain(F.gelu)
    block.up, block.down = weight_norm(block.up), weight_norm(block.down)
    return block


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


ALL = (
    Architecture(
        "squeeze and excite",
        SqueezeExcite,
        lambda: floats(2, 3, 6, 6),
        refused=(("", "its result scales its own input"),),
    ),
    Architecture("hidden value read elsewhere", ReadElsewhere, _tokens, refused=(("", "is also read by linear"),)),
    Architecture("hidden value returned", Returned, _tokens, refused=(("", "is also an output of the model"),)),
    Architecture(
        "weight norm",
        lambda: Residual(_normed),
        _tokens,
        refused=(("blocks.0*", "the weight is computed by _weight_norm"),),
    ),
    Architecture("low-rank adapters", lambda: Residual(Adapted), _tokens, refused=(("blocks.0", "low-rank adapters"),)),
    Architecture("autoencoder with skips", Autoencoder, lambda: floats(3, 16)),
    Architecture(
        "MLP classifier",
        _mlp,
        lambda: floats(3, 16, name="input"),
        refused=(("", "a chain of linear layers"),),
    ),
    Architecture("VAE", Vae, lambda: floats(3, 16), refused=(("", "is also read by linear"),)),
    Architecture("ResNet bottleneck", Bottleneck, lambda: floats(2, 3, 8, 8)),
    Architecture(
        "BatchNorm inside",
        BatchNormInside,
        lambda: floats(2, 3, 8, 8),
        refused=(("down", "batch_norm stands between"),),
    ),
    Architecture("GRU language model", GruLanguageModel, ids, refused=(("head", "an output head"),), fixed=True),
    Architecture("broadcast add", Broadcast, _tokens, refused=(("inner", "is broadcast when it is added"),)),
    Architecture(
        "rows mixed inside",
        lambda: Residual(RowMixing),
        _tokens,
        refused=(("blocks.0", "mean works along a row axis"),),
    ),
)
