"""The tensors of a checkpoint: weights and the optimizer's moments by name, a rank's experts as part of the whole.

A stacked weight [E, ...] becomes a DTensor ``Shard(0)`` on the ``ep`` dimension, here only: saved as a plain tensor,
one rank's experts would be taken for all of them, without an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moeify.distributed.binding import binding_of
from moeify.ir.roles import EXPERTS

MODEL, OPTIMIZER = "model.", "optimizer."


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        found.setdefault(id(value), (name, value.detach()))
    return dict(found.values())


def state_of(module: nn.Module, mesh: DeviceMesh | None, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Everything to save, and to load into: the tensors share memory with the module and the optimizer. Only a module
    with a part of the experts needs the mesh.

    Raises ValueError for a parameter that FSDP has cut: its own state_dict is the way.
    """
    whole = {name: block.experts for block in binding_of(module).sharding.blocks for name in block.parameters}
    state = {}
    for name, value in weights(module).items():
        state[f"{MODEL}{name}"] = _part(value, mesh, whole.get(name))
    if optimizer is not None:
        for name, key, value in _moments(module, optimizer):
            experts = whole.get(name) if value.dim() else None  # the step count is a number
            state[f"{OPTIMIZER}{key}.{name}"] = _part(value, mesh, experts)
    return state


def prepare(module: nn.Module, optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Give the optimizer an empty place for every moment that a checkpoint with these names holds."""
    for name, parameter in module.named_parameters():
        keys = [key.removeprefix(OPTIMIZER) for key in names if key.startswith(OPTIMIZER)]
        for key in keys:
            kind, _, of = key.partition(".")
            if of == name:
                # As torch makes them: the count of steps on the CPU.
                place = torch.zeros(()) if kind == "step" else torch.zeros_like(parameter)
                optimizer.state[parameter][kind] = place


def _moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the optimizer keeps {key}, which is no tensor")
            yield name, key, value


def _part(value: Tensor, mesh: DeviceMesh | None, experts: int | None) -> Tensor:
    if isinstance(value, DTensor):
        raise ValueError("a parameter is a DTensor already: save a module before fully_shard")
    if experts is None:
        return value
    assert mesh is not None
    shape = (experts, *value.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, mesh[EXPERTS], [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
