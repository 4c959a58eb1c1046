"""torch.nn transformers and hand-written models with attention around their blocks."""

from __future__ import annotations

from torch import Tensor, nn

from tests.architectures.kinds import Architecture, Blocks, floats, ids


class Both(nn.Module):
    """An encoder and a decoder of torch.nn."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True, norm_first=norm_first, activation="gelu")

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.model(source, target)


class Parallel(nn.Module):
    """Attention and feed-forward block read the same norm and are added to the stream together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        n = self.norm(x)
        x = x + self.attention(n, n, n, need_weights=False)[0] + self.down(self.up(n).sigmoid())
        return self.head(x)


def _encoder(norm_first: bool, activation: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, activation=activation)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ALL = (
    Architecture(
        "nn.TransformerEncoder",
        lambda: _encoder(False, "relu"),
        lambda: floats(2, 6, 16, name="src"),
        (Blocks("layers.?", 2, "relu", 32),),
        (("layers.0.self_attn", "an attention output projection"),),
    ),
    Architecture(
        "nn.TransformerEncoder (norm first)",
        lambda: _encoder(True, "gelu"),
        lambda: floats(2, 6, 16, name="src"),
        (Blocks("layers.?", 2, "gelu", 32),),
    ),
    Architecture(
        "nn.Transformer",
        lambda: Both(False),
        lambda: floats(2, 6, 16, name="source") | floats(2, 5, 16, name="target"),
        (Blocks("model.*coder.layers.?", 4, "gelu", 32),),
    ),
    Architecture(
        "nn.Transformer (norm first)",
        lambda: Both(True),
        lambda: floats(2, 6, 16, name="source") | floats(2, 5, 16, name="target"),
        (Blocks("model.*coder.layers.?", 4, "gelu", 32),),
    ),
    Architecture(
        "parallel attention and block",
        Parallel,
        ids,
        (Blocks("", 1, "sigmoid", 32),),
        (("head", "an output head"),),
    ),
)
