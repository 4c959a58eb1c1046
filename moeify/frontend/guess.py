"""Example inputs nobody described: guessed from the model's first layer and tried by running it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moeify.errors import BadInputSpec
from moeify.frontend.calling import mode, run
from moeify.frontend.inputs import Example, TensorSpec, required, tensor_names
from moeify.frontend.reasons import first_line
from moeify.frontend.vocabulary import make_examples

BATCH, SEQ = ("batch", 2), ("seq", 16)
_IMAGE_SIZES = (32, 224, 28, 64, 16, 96, 128, 256, 384)  # the first that the model accepts
_SEQUENCE_MODELS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.RNNBase)
Dim = tuple[str, int] | int


def guess_examples(module: nn.Module) -> tuple[list[Example], str]:
    """Inputs that the model runs on, and a note that says what was guessed. Raises BadInputSpec when no guess runs."""
    names = required(module) or tensor_names(module, 1)
    last: Exception | None = None
    for dtype, dims in candidates(module):
        specs = [_spec(name, dtype, dims) for name in names]
        try:
            with torch.no_grad(), mode(module, training=False):
                examples = make_examples(module, specs)
                run(module, {e.name: e.tensor for e in examples})
        except Exception as error:  # a wrong guess may fail in any way
            last = last or error
            continue
        return examples, f"guessed the input {' '.join(map(str, specs))}"
    why = f": {type(last).__name__}: {first_line(last)}" if last and str(last).strip() else ""
    raise BadInputSpec(
        f"cannot guess an input that {type(module).__name__} runs on{why}",
        hint=" ".join(["give", *(f"--input {name}=dtype[batch=2,...]" for name in names)]),
    )


def _spec(name: str, dtype: torch.dtype, dims: tuple[Dim, ...]) -> TensorSpec:
    sizes = tuple(d if isinstance(d, int) else d[1] for d in dims)
    names = tuple(d if isinstance(d, int) else d[0] for d in dims)
    return TensorSpec(name, dtype, sizes, names)


def candidates(module: nn.Module) -> Iterator[tuple[torch.dtype, tuple[Dim, ...]]]:
    """Guesses in the order they are tried: by the first layers that say something about their input."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    seen = set()
    for layer in module.modules():
        for integer, dims in _for_layer(layer, module):
            guess = (torch.int64 if integer else dtype, dims)
            if guess not in seen:
                seen.add(guess)
                yield guess
        if len(seen) > 24:  # deep layers say nothing about the model's input
            return


def _for_layer(layer: nn.Module, module: nn.Module) -> Iterator[tuple[bool, tuple[Dim, ...]]]:
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        yield True, (BATCH, SEQ)
        yield True, (BATCH,)
    elif isinstance(layer, nn.Linear):
        rows, tokens = (BATCH, layer.in_features), (BATCH, SEQ, layer.in_features)
        yield from ((False, dims) for dims in ((tokens, rows) if _reads_sequences(module) else (rows, tokens)))
    elif isinstance(layer, nn.Conv1d):
        yield False, (BATCH, layer.in_channels, ("length", 64))
        yield False, (BATCH, layer.in_channels, 64)
        yield False, (BATCH, layer.in_channels, 1024)
    elif isinstance(layer, nn.Conv2d):
        yield from ((False, (BATCH, layer.in_channels, size, size)) for size in _IMAGE_SIZES)
    elif isinstance(layer, nn.Conv3d):
        yield from ((False, (BATCH, layer.in_channels, size, size, size)) for size in (8, 16, 32))
    elif isinstance(layer, nn.RNNBase):
        yield False, (BATCH, SEQ, layer.input_size) if layer.batch_first else (SEQ, BATCH, layer.input_size)
    elif isinstance(layer, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        attention = layer if isinstance(layer, nn.MultiheadAttention) else layer.self_attn
        width = attention.embed_dim
        yield False, (BATCH, SEQ, width) if attention.batch_first else (SEQ, BATCH, width)
    elif isinstance(layer, nn.LayerNorm):
        yield False, (BATCH, SEQ, *layer.normalized_shape)
        yield False, (BATCH, *layer.normalized_shape)
    elif isinstance(layer, nn.BatchNorm1d):
        yield False, (BATCH, layer.num_features)
    elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
        channels = layer.num_features if isinstance(layer, nn.BatchNorm2d) else layer.num_channels
        yield from ((False, (BATCH, channels, size, size)) for size in _IMAGE_SIZES)


def _reads_sequences(module: nn.Module) -> bool:
    return any(isinstance(m, _SEQUENCE_MODELS) or "attention" in type(m).__name__.lower() for m in module.modules())
