"""Example inputs of transformers models, from ``main_input_name`` and the config.

``model.dummy_inputs`` is of no use for vision and audio. Nothing here imports transformers: it reads attributes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moeify.frontend.calling import mode, run
from moeify.frontend.inputs import Example, TensorSpec, forward_parameters
from moeify.frontend.meta import is_meta
from moeify.frontend.vocabulary import make_examples


def is_transformers(module: nn.Module) -> bool:
    """Whether the module is a PreTrainedModel, found without importing transformers."""
    return any(c.__module__ == "transformers.modeling_utils" for c in type(module).__mro__)


def hf_examples(module: nn.Module) -> tuple[list[Example], str] | None:
    """The first set of inputs that runs, and a note; None when no set does."""
    for specs in _candidates(module):
        examples = make_examples(module, specs)
        note = f"inputs from the config: {' '.join(map(str, specs))}"
        if is_meta(module):  # masks read values, which meta tensors do not have: torch.export is the first to run it
            return examples, note
        try:
            with torch.no_grad(), mode(module, training=False):
                run(module, {e.name: e.tensor for e in examples})
        except Exception:  # the next candidate, or the guess by layers, which explains itself
            continue
        return examples, note
    return None


def _candidates(module: nn.Module) -> Iterator[list[TensorSpec]]:
    config: Any = module.config
    names = forward_parameters(module)
    main = getattr(module, "main_input_name", "input_ids")
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    text = _ids("input_ids", config, "seq", 16)
    decoder = []
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        decoder = [_ids("decoder_input_ids", config, "decoder_seq", 8)]
    mask = [TensorSpec("attention_mask", torch.int64, (2, 16), ("batch", "seq"))]
    mask = mask if "attention_mask" in names else []
    if main == "input_ids" and "input_ids" in names:
        if {"pixel_values", "input_ids"} <= set(names) and not hasattr(module, "lm_head"):
            yield [text, *mask, *_pixels(config, dtype)]
        yield [text, *mask, *decoder]
        yield [text, *decoder]
    elif main == "pixel_values":
        for pixels in _pixels(config, dtype):
            yield [pixels, *decoder]
            yield [pixels, text, *mask]
    elif main == "input_features":
        mels = _first(config, "num_mel_bins", "input_feat_per_channel", "feature_size") or 80
        positions = getattr(config, "max_source_positions", None)
        if positions:  # Whisper takes exactly two frames for each position
            yield [
                TensorSpec(main, dtype, (2, mels, 2 * positions), ("batch", mels, 2 * positions)),
                *decoder,
            ]
        yield [TensorSpec(main, dtype, (2, mels, 64), ("batch", mels, "frames")), *decoder]
        yield [TensorSpec(main, dtype, (2, 64, mels), ("batch", "frames", mels)), *decoder]
    elif main == "input_values":
        yield [TensorSpec(main, dtype, (2, 16000), ("batch", 16000)), *decoder]
        mels, length = _first(config, "num_mel_bins"), _first(config, "max_length")
        if mels and length:  # AST
            yield [TensorSpec(main, dtype, (2, length, mels), ("batch", length, mels))]


def _ids(name: str, config: Any, dim: str, size: int) -> TensorSpec:
    vocabulary = _first(config, "vocab_size")
    return TensorSpec(name, torch.int64, (2, size), ("batch", dim), vocabulary)


def _pixels(config: Any, dtype: torch.dtype) -> list[TensorSpec]:
    size = _first(config, "image_size") or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = _first(config, "num_channels", "in_channels") or 3
    dims = (channels, height, width)
    return [TensorSpec("pixel_values", dtype, (2, *dims), ("batch", *dims))]


def _first(config: Any, *keys: str) -> Any:
    """The first of the keys that the config or one of its parts (text, vision, encoder, ...) has."""
    parts = [config] + [v for k, v in vars(config).items() if k in _PARTS and v is not None]
    for key in keys:
        for part in parts:
            value = part.get(key) if isinstance(part, dict) else getattr(part, key, None)
            if value is not None:
                return value
    return None


_PARTS = ("text_config", "vision_config", "encoder", "decoder", "audio_config", "backbone_config")
