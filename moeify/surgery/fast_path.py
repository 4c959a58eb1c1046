"""nn.TransformerEncoder's fast path: it reads the weights of the layers that were replaced."""

from __future__ import annotations

from torch import nn

from moeify.surgery.slot import Stand


def disable_fast_path(model: nn.Module) -> None:
    """Turn it off where a converted block stands, in the layers and in the encoders that hold them."""
    converted = {
        layer
        for layer in model.modules()
        if isinstance(layer, nn.TransformerEncoderLayer) and isinstance(layer.linear1, Stand)
    }
    for layer in converted:
        layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and converted & set(encoder.layers):
            encoder.use_nested_tensor = False
