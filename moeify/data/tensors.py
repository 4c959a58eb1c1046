"""Tensors by input name, read without executing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file

from moeify.errors import BadInputSpec, UnreadableFile
from moeify.ir.program import InputSpec

_MORE_THAN_TENSORS = ("Unsupported global", "unsupported GLOBAL", "Object arrays")  # as torch and numpy say it
LABELS = "labels"  # the tensor beside a model's inputs that holds the right classes
_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")


def read(path: str | Path, specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """One batch of inputs from a .pt (dict or list of tensors), .npz or .safetensors file, in the order of ``specs``.

    Raises UnreadableFile, or BadInputSpec when names, ranks, fixed sizes or types do not fit the model's inputs.
    """
    return fit(tensors(Path(path)), specs, str(path))


def fit(
    tensors: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], specs: Sequence[InputSpec], source: str
) -> tuple[torch.Tensor, ...]:
    """Tensors, by name or in order, as the inputs of a model. ``source`` is where they come from, for errors.

    Raises BadInputSpec when they do not fit, and for tensors on which nothing can be compared.
    """
    tensors = named(tensors, specs, source)
    return tuple(_fitted(tensors[spec.name], spec, source) for spec in specs)


def named(
    tensors: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], specs: Sequence[InputSpec], source: str
) -> dict[str, torch.Tensor]:
    """The model's inputs by name; their shapes are not looked at. Raises BadInputSpec where one is missing."""
    if not isinstance(tensors, Mapping):
        if len(tensors) != len(specs):
            raise BadInputSpec(f"{source} holds {len(tensors)} tensors and the model reads {len(specs)}")
        return {spec.name: tensor for spec, tensor in zip(specs, tensors)}
    missing = [spec.name for spec in specs if spec.name not in tensors]
    if missing:
        raise BadInputSpec(
            f"{source} has no tensor named {missing[0]!r}", hint=f"the model reads {', '.join(map(str, specs))}"
        )
    return {spec.name: tensors[spec.name] for spec in specs}


def tensors(path: Path) -> dict[str, torch.Tensor] | list[torch.Tensor]:
    """All tensors of a file, by name or in order. Raises UnreadableFile."""
    if path.suffix not in _SUFFIXES:
        raise UnreadableFile(f"cannot tell what kind of data {path} is", hint="use .pt, .npz or .safetensors")
    if not path.is_file():
        raise UnreadableFile(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and numpy raise whatever a damaged file makes them meet
        if any(text in str(error) for text in _MORE_THAN_TENSORS):
            raise UnreadableFile(f"the data {path} holds more than tensors, so it was not read") from error
        raise UnreadableFile(f"the data {path} is damaged, or of another kind than its name says") from error
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(v, torch.Tensor) for v in value):
        return list(value)
    if isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values()):
        return value
    raise UnreadableFile(f"the data {path} is not a tensor, a list of tensors or a dict of tensors")


def _fitted(tensor: torch.Tensor, spec: InputSpec, source: str) -> torch.Tensor:
    fits = tensor.dim() == len(spec.shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, spec.shape)
    )
    if not fits:
        raise BadInputSpec(f"{source}: {spec.name} has shape {tuple(tensor.shape)}, the model reads {spec}")
    if tensor.is_floating_point() != spec.dtype.is_floating_point:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise BadInputSpec(f"{source}: {spec.name} is {dtype}, the model reads {spec}")
    if not tensor.numel() or tensor.isnan().any():  # infinity is fine: additive masks hold it
        what = "holds NaN" if tensor.numel() else "is empty"
        raise BadInputSpec(f"{source}: {spec.name} {what}: nothing can be compared on it")
    return tensor.to(spec.dtype)
