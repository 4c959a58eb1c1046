"""What the processes of tests/test_distributed_checkpoint.py do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh

from moeify.distributed import checkpoint, checkpoint_tensors
from moeify.distributed.binding import bind, binding_of
from moeify.distributed.gradients import sync_gradients
from moeify.distributed.processes import SECONDS
from moeify.ir.modes import TrainableGraph
from moeify.ir.program import Program
from tests import rank_work, sharded

RATE = 1e-3
_MORE = 4.0  # seconds that a rank stays away beyond what the other one waits for it


def program(**recipe: Any) -> Program:
    """The whole program with parameters of its own."""
    made = rank_work.fresh(**recipe) if recipe else rank_work.PROGRAM.clone()
    made.graph_module = sharded.own_parameters(made)
    return made


def alone(steps: int) -> nn.Module:
    """The steps in one process, without any of this."""
    made = program()
    module = TrainableGraph(made.graph_module, made.graph).train()
    optimizer = torch.optim.AdamW(module.parameters(), RATE)
    for step in range(steps):
        _step(module, optimizer, step)
    return module


def go_on(
    mesh: DeviceMesh, folder: Path, found: Path | None, steps: int, keep: int = 9
) -> tuple[Path, dict[str, Tensor]]:
    """Some more steps from a checkpoint, and the next one: all ranks do the same rows, as one process would."""
    module = bind(rank_work.part(mesh, program()), mesh).train()
    optimizer = torch.optim.AdamW(module.parameters(), RATE)
    done = 0
    if found is not None:
        done = checkpoint.load(module, mesh, found, optimizer=optimizer).step
    for step in range(done, done + steps):
        _step(module, optimizer, step, bound=True)
    saved = checkpoint.save(module, mesh, folder, done + steps, optimizer=optimizer, facts={"by": "test"}, keep=keep)
    return saved, {name: p.detach() for name, p in module.named_parameters()}


def in_small_files(mesh: DeviceMesh, folder: Path, limit: int) -> Path:
    checkpoint.FILE_BYTES = limit
    return go_on(mesh, folder, None, 1)[0]


def load(mesh: DeviceMesh, found: Path, recipe: dict[str, Any]) -> str:
    module = bind(rank_work.part(mesh, program(**recipe)), mesh)
    checkpoint.load(module, mesh, found)
    return "loaded"


def load_own(mesh: DeviceMesh, places: list[Path]) -> str:
    """Each rank reads what lies under its own name for the folder."""
    return load(mesh, places[mesh.get_rank()], {})


def load_alone(mesh: DeviceMesh, found: Path, fault: str, seconds: float = SECONDS) -> None:
    """The last rank goes wrong where the other one loads."""
    module = bind(rank_work.part(mesh, program()), mesh, timeout=seconds)
    if _is_last():
        if fault == "absent":
            time.sleep(seconds + _MORE)
            return
        if fault == "stops":
            binding_of(module).groups.board.stop(mesh.get_rank(), "the data ended")
            raise ValueError("the data ended")
        checkpoint_tensors.state_of = _fails
    checkpoint.load(module, mesh, found)


def save_alone(mesh: DeviceMesh, folder: Path, fault: str, seconds: float = SECONDS) -> None:
    """The last rank goes wrong while the other one saves."""
    module = bind(rank_work.part(mesh, program()), mesh, timeout=seconds)
    if _is_last():
        if fault == "raises":
            checkpoint_tensors.state_of = _fails
        else:
            HuggingFaceStorageWriter.write_data = {  # type: ignore[method-assign]
                "hangs": lambda *_: time.sleep(seconds + _MORE),
                "is killed": lambda *_: os.kill(os.getpid(), 9),
            }[fault]
    checkpoint.save(module, mesh, folder, 9)


def disk_full(mesh: DeviceMesh, folder: Path) -> None:
    """The disk of the last rank is full."""
    module = bind(rank_work.part(mesh, program()), mesh)
    if _is_last():
        HuggingFaceStorageWriter.write_data = _no_space  # type: ignore[method-assign]
    checkpoint.save(module, mesh, folder, 9)


def killed_while_writing(mesh: DeviceMesh, folder: Path, seconds: float) -> None:
    module = bind(rank_work.part(mesh, program()), mesh, timeout=seconds)
    if _is_last():
        HuggingFaceStorageWriter.write_data = _end  # type: ignore[method-assign]
    checkpoint.save(module, mesh, folder, 9)


def diverged(mesh: DeviceMesh, folder: Path) -> None:
    """An expert of the last rank has become NaN."""
    module = bind(rank_work.part(mesh, program()), mesh)
    if _is_last():
        name = next(name for name, _ in module.named_parameters() if name.endswith("experts.up"))
        with torch.no_grad():
            module.get_parameter(name)[0, 0, 0] = float("nan")
    checkpoint.save(module, mesh, folder, 9)


def _end(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def transposed(mesh: DeviceMesh, folder: Path) -> Path:
    """A dense weight that does not lie in order in memory."""
    module = bind(rank_work.part(mesh, program()), mesh)
    name, weight = next((n, p) for n, p in module.named_parameters() if p.dim() == 2)
    weight.data = weight.data.t().contiguous().t()
    assert not module.get_parameter(name).is_contiguous()
    return checkpoint.save(module, mesh, folder, 1)


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, step: int, bound: bool = False) -> None:
    optimizer.zero_grad()
    # Large losses: gradients that are rounding alone would be scaled up to whole steps by Adam.
    sharded.loss_of(module(rank_work.tokens(0, step))).backward()
    if bound:
        sync_gradients(module)
    optimizer.step()


def _is_last() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _fails(*_: Any) -> Any:
    raise ValueError("no such luck")


def _no_space(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")
