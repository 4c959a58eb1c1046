"""Tensors to safetensors files of a bounded size and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moeify.errors import OutputNotWritten, Refused, UnreadableFile

SHARD_BYTES = 5 * 1000**3


def write(tensors: Mapping[str, torch.Tensor], folder: Path, stem: str, limit: int = SHARD_BYTES) -> dict[str, str]:
    """Write ``{stem}-00001-of-0000N.safetensors``; gives file name by tensor name.

    A shard holds at least one tensor and otherwise at most ``limit`` bytes. Raises Refused for a tensor without a
    value, OutputNotWritten or OSError.
    """
    groups = list(_groups(tensors, limit))
    index: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        try:
            save_file(_separate({name: tensors[name] for name in names}), folder / file)
        except SafetensorError as error:
            raise OutputNotWritten(
                f"cannot write {file}: {error}", hint="nothing was changed; free space or choose another folder"
            ) from error
        index.update(dict.fromkeys(names, file))
    return index


def read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one file, one at a time. Raises UnreadableFile."""
    if not path.is_file():
        raise UnreadableFile(f"the checkpoint's file {path.name} is missing", where=str(path.parent))
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                # A copy of its own: memory mapped from the file is not aligned, and sums come out in another order.
                yield name, file.get_tensor(name).clone()
    except SafetensorError as error:
        raise UnreadableFile(
            f"{path.name} is damaged or cut short: {error}",
            where=str(path.parent),
            hint="copy the folder again, all of it",
        ) from error


def _groups(tensors: Mapping[str, torch.Tensor], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise Refused(f"{name} has no value: it is on the meta device")
        bytes_ = tensor.numel() * tensor.element_size()
        if names and size + bytes_ > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    if names:
        yield names


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, none of which shares memory with another: safetensors refuses those."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous()
        place = value.untyped_storage().data_ptr()
        if place in seen:
            value = value.clone()
        seen.add(place)
        result[name] = value
    return result
