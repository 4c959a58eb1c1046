"""The user's data for verification: tensors by input name, read without executing anything."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moeify.errors import BadInputSpec, UnreadableFile
from moeify.ir.program import InputSpec


def read(path: str | Path, specs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """One batch of inputs from a .pt (dict or list of tensors), .npz or .safetensors file, in the order of ``specs``.

    Raises UnreadableFile, or BadInputSpec when names, ranks, fixed sizes or types do not fit the model's inputs.
    """
    path = Path(path)
    tensors = _tensors(path)
    if isinstance(tensors, list):
        if len(tensors) != len(specs):
            raise BadInputSpec(f"{path} holds {len(tensors)} tensors and the model reads {len(specs)}")
        tensors = {spec.name: tensor for spec, tensor in zip(specs, tensors)}
    missing = [spec.name for spec in specs if spec.name not in tensors]
    if missing:
        raise BadInputSpec(
            f"{path} has no tensor named {missing[0]!r}", hint=f"the model reads {', '.join(map(str, specs))}"
        )
    return tuple(_fitted(tensors[spec.name], spec, path) for spec in specs)


def _tensors(path: Path) -> dict[str, torch.Tensor] | list[torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix in (".pt", ".pth", ".bin"):
            value = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UnreadableFile(f"cannot tell what kind of data {path} is", hint="use .pt, .npz or .safetensors")
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise UnreadableFile(f"cannot read the data {path}: {_first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise UnreadableFile(f"the data {path} holds more than tensors, so it was not read") from error
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(v, torch.Tensor) for v in value):
        return list(value)
    if isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values()):
        return value
    raise UnreadableFile(f"the data {path} is not a tensor, a list of tensors or a dict of tensors")


def _fitted(tensor: torch.Tensor, spec: InputSpec, path: Path) -> torch.Tensor:
    fits = tensor.dim() == len(spec.shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, spec.shape)
    )
    if not fits:
        raise BadInputSpec(f"{path}: {spec.name} has shape {tuple(tensor.shape)}, the model reads {spec}")
    if tensor.is_floating_point() != spec.dtype.is_floating_point:
        raise BadInputSpec(f"{path}: {spec.name} is {str(tensor.dtype).removeprefix('torch.')}, the model reads {spec}")
    return tensor.to(spec.dtype)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
