"""Inputs of a model for a given number of tokens, made from its example inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeify.ir.program import Program

_SEQUENCE = 128  # tokens of a row of the batch, where the sequence may be as long


@dataclass(frozen=True)
class Batch:
    """Inputs, and the sizes their dynamic dimensions have."""

    inputs: tuple[torch.Tensor, ...]
    sizes: dict[str, int]


def batch(program: Program, tokens: int, rows: int, seed: int = 0) -> Batch:
    """Inputs that make about ``tokens`` rows in the blocks, of which the example makes ``rows``.

    The first dynamic dimension of the inputs is taken for the batch, the second for the sequence; a model that has
    one of them gets as many as ``tokens`` needs, one that has none gets its example, and further dynamic dimensions
    keep the example's sizes. The sequence is ``min(tokens, 128)``, the batch what is left. Values are drawn from the
    example's own, so that indices stay in range; masks (at most two values) keep their pattern.
    """
    example: dict[str, int] = {}
    for spec, tensor in zip(program.inputs, program.example, strict=True):
        for name, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(name, str):
                example.setdefault(name, size)
    names = list(example)
    sizes = dict(example)
    if len(names) == 1:
        each = rows / example[names[0]]
        sizes[names[0]] = max(1, round(tokens / each))
    elif names:
        each = rows / (example[names[0]] * example[names[1]])  # 1 unless patches or heads are rows too
        wanted = max(1, round(tokens / each))
        sizes[names[1]] = min(wanted, _SEQUENCE)
        sizes[names[0]] = max(1, wanted // sizes[names[1]])
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for spec, tensor in zip(program.inputs, program.example, strict=True):
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        inputs.append(_resized(tensor, shape, generator))
    return Batch(tuple(inputs), sizes)


def _resized(tensor: torch.Tensor, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if tensor.numel() == 0:
        return tensor.new_zeros(shape)
    if tensor.dtype == torch.bool or tensor.unique().numel() <= 2:
        for dim, size in enumerate(shape):
            tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
        return tensor
    values = tensor.flatten()
    return values[torch.randint(len(values), shape, generator=generator)]
