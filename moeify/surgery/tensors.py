"""The tensors of a model by name, for writing and for filling a skeleton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from moeify.errors import Refused


@dataclass
class Tensors:
    """``weights``: parameters and persistent buffers, each once, under its first name. ``aliases``: other name ->
    first name. ``buffers``: those that state_dict leaves out. ``frozen``: parameters without gradient."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)


def collect(model: nn.Module) -> Tensors:
    """Raises Refused for state that is not a tensor (``get_extra_state``)."""
    found = Tensors()
    first: dict[int, str] = {}
    for name, tensor, persistent in _walk(model):
        if not persistent:
            found.buffers[name] = tensor
        elif id(tensor) in first:
            found.aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            found.weights[name] = tensor
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                found.frozen.append(name)
    return found


def assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of the parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        assert isinstance(value, nn.Parameter), name
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value


def _walk(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise Refused(
                f"{type(module).__name__} keeps state that is not a tensor, which a checkpoint folder cannot hold",
                where=path or None,
            )
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + leaf, parameter, True
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                yield prefix + leaf, buffer, leaf not in module._non_persistent_buffers_set
