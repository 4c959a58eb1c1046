"""Hand-written models: one spelling of a feed-forward block each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.kinds import Architecture, Blocks, floats, ids

D, H = 8, 24


class Residual(nn.Module):
    """``x + block(norm(x))`` twice, over ``[batch, tokens, D]``."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(norm(x))
        return x


class Plain(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, H), nn.Linear(H, D, bias=False), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class RawMatmul(nn.Module):
    """Weights that no layer holds, the bias added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(D, H)), nn.Parameter(torch.randn(H))
        self.w2, self.b2 = nn.Parameter(torch.randn(H, D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w1 + self.b1) @ self.w2 + self.b2


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(D, H)), nn.Parameter(torch.randn(D, H))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(torch.einsum("btd,df->btf", x, self.w1))
        return torch.einsum("btf,df->btd", h, self.w2)


class Fused(nn.Module):
    """One layer for gate and up; ``cut`` takes it apart."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, Tensor]], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up, self.down, self.cut, self.act = nn.Linear(D, 2 * H), nn.Linear(H, D), cut, act

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.cut(self.gate_up(x))
        return self.down(self.act(gate) * up)


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.gate_up(x)))


class Gated(nn.Module):
    """``act(gate) * up`` or, turned, ``up * act(gate)``."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.up, self.gate, self.down, self.turned = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D), turned

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up(x), F.gelu(self.gate(x))
        return self.down(up * gate if self.turned else gate * up)


class Conv(nn.Module):
    """Pointwise convolutions in a residual, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, padding=1)
        self.up, self.down = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.down(F.gelu(self.up(x)))


class Conv1d(nn.Module):
    """An FFN as Conv1d of kernel 1 between two transpositions, as FastSpeech writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(D, H, 1), nn.Conv1d(H, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(D, H), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(H, D), nn.Dropout(0.3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Scaled(nn.Module):
    """Layer scale and a norm after the block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain(F.gelu)
        self.after, self.gamma = nn.LayerNorm(D), nn.Parameter(torch.full((D,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.after(self.inner(x))


class NormInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.gelu(self.up(x))))


class LstmLanguageModel(nn.Module):
    """An FFN without residual between two LSTMs, where the first sparsely gated mixture of experts stood."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, D)
        self.first, self.second = nn.LSTM(D, D, batch_first=True), nn.LSTM(D, D, batch_first=True)
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.head = nn.Linear(D, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, _ = self.first(self.embed(input_ids))
        x = self.down(torch.relu(self.up(x)))
        x, _ = self.second(x)
        return self.head(x)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.tokens = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.channels = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Tabular(nn.Module):
    """A residual MLP over table rows, one row per example."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, D)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.1), nn.Linear(H, D))
            for _ in range(2)
        )
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.relu())


class Shared(nn.Module):
    """One block called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = Plain(F.gelu), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(x + self.block(x))
        return x


class Flattened(nn.Module):
    """Rows merged to one axis around the block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.mish(self.up(x.reshape(-1, D)))).view(x.shape)


def _chunk(u: Tensor) -> tuple[Tensor, Tensor]:
    return u.chunk(2, -1)  # type: ignore[return-value]


def _pairs(u: Tensor) -> tuple[Tensor, Tensor]:
    return u.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[return-value]


def _stacked(u: Tensor) -> tuple[Tensor, Tensor]:
    u = u.view(*u.shape[:-1], 2, H)
    return u[..., 0, :], u[..., 1, :]


def _tokens() -> dict[str, Tensor]:
    return floats(2, 6, D)


def _residual(
    name: str, make: Callable[[], nn.Module], activation: str, gated: bool = False, paths: str = "blocks.?*"
) -> Architecture:
    return Architecture(name, lambda: Residual(make), _tokens, (Blocks(paths, 2, activation, H, gated),))


ALL = (
    _residual("squared ReLU without bias", lambda: Plain(lambda u: F.relu(u).square()), "relu2"),
    _residual("quick GELU spelled out", lambda: Plain(lambda u: u * torch.sigmoid(1.702 * u)), "quick_gelu"),
    _residual("SELU", lambda: Plain(F.selu), "selu"),
    _residual("hard swish", lambda: Plain(F.hardswish), "hardswish"),
    _residual("an activation without a name", lambda: Plain(torch.sin), "custom"),
    _residual("PReLU (learnable)", lambda: Plain(nn.PReLU()), "custom"),
    _residual("leaky ReLU of slope 0.25", lambda: Plain(lambda u: F.leaky_relu(u, 0.25)), "custom"),
    _residual("raw parameters, matmul", RawMatmul, "relu", paths="blocks.?"),
    _residual("raw parameters, einsum", Einsum, "silu", paths="blocks.?"),
    _residual("fused, chunk", lambda: Fused(_chunk, F.silu), "silu", True),
    _residual("fused, chunk, gate last", lambda: Fused(lambda u: _chunk(u)[::-1], F.silu), "silu", True),
    _residual("fused, split", lambda: Fused(lambda u: u.split(H, -1), F.gelu), "gelu", True),
    _residual("fused, slices", lambda: Fused(lambda u: (u[..., :H], u[..., H:]), F.relu), "relu", True),
    _residual(
        "fused, interleaved slices",
        lambda: Fused(lambda u: (u[..., ::2], u[..., 1::2]), F.silu),
        "silu",
        True,
    ),
    _residual("fused, unflatten and unbind", lambda: Fused(_pairs, F.silu), "silu", True),
    _residual("fused, view and index", lambda: Fused(_stacked, F.silu), "silu", True),
    _residual("fused, unknown activation", lambda: Fused(_chunk, torch.sin), "custom", True),
    _residual("fused, interleaved, unknown activation", lambda: Fused(_pairs, torch.sin), "custom", True),
    _residual("fused, glu", Glu, "sigmoid", True),
    _residual("bilinear", lambda: Fused(_chunk, lambda u: u), "identity", True),
    _residual("gated", lambda: Gated(False), "gelu", True),
    _residual("gated, turned", lambda: Gated(True), "gelu", True),
    _residual("convolutions of width 1 over tokens", Conv1d, "relu"),
    _residual("in-place activation and dropouts", Inplace, "relu"),
    _residual("layer scale and norm after", Scaled, "gelu"),
    _residual("a norm over the hidden width", NormInside, "custom"),
    Architecture("1x1 convolutions", Conv, lambda: floats(2, 3, 6, 6), (Blocks("", 1, "gelu", H),)),
    Architecture(
        "LSTM language model",
        LstmLanguageModel,
        ids,
        (Blocks("", 1, "relu", H),),
        (("head", "an output head"),),
        fixed=True,
    ),
    Architecture(
        "MLP-Mixer",
        Mixer,
        _tokens,
        (Blocks("tokens", 1, "gelu", 12, rows="channel"), Blocks("channels", 1, "gelu", H)),
    ),
    Architecture(
        "tabular residual MLP",
        Tabular,
        lambda: floats(4, 5),
        (Blocks("layers.?", 2, "relu", H, rows="sample"),),
    ),
    Architecture("one block called three times", Shared, _tokens, (Blocks("block", 1, "gelu", H, calls=3),)),
    Architecture("rows merged to one axis", Flattened, _tokens, (Blocks("", 1, "mish", H),)),
)
