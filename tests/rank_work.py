"""What the processes of tests/ranks.py do. The fork server imports this once, with the programs, and its children have
them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moeify.api.load import read_graph
from moeify.distributed import checkpoint
from moeify.distributed.binding import bind, binding_of
from moeify.distributed.fsdp import fully_shard
from moeify.distributed.gradients import clip_gradients, gradient_norm, sync_gradients
from moeify.errors import DistributedError, MoeifyError
from moeify.ir.program import Program, flat
from moeify.pipeline.runner import run
from tests import programs, sharded
from tests.test_route import routed

STEPS = 5
RATE = 1e-2


def two_layers(**recipe: Any) -> Program:
    return programs.gated(2, **recipe)


def fresh(make: Callable[..., Program] = two_layers, **recipe: Any) -> Program:
    """A routed program whose weights differ, the same in every process."""
    torch.manual_seed(0)
    made = make(**recipe)
    routed(made)
    return sharded.distinct(made)


PROGRAM = fresh(experts=4)
SWITCH = fresh(experts=4, router="switch", top_k=1)
FLOATS = fresh(programs.images, experts=4)


def tokens(rank: int, step: int = 0) -> Tensor:
    return torch.randint(40, (2, 3 + rank % 3), generator=torch.Generator().manual_seed(100 * step + rank))


def part(mesh: DeviceMesh, program: Program = PROGRAM, ranks: int = 0, rank: int = -1) -> Program:
    """This rank's part of the program, or that of another rank of a larger group."""
    ep = mesh["ep"]
    ranks = ranks or ep.size()
    return sharded.parts(program, ranks)[rank if rank >= 0 else ep.get_local_rank()]


def numbers(mesh: DeviceMesh) -> sharded.Result:
    return sharded.on_rank(part(mesh), mesh, tokens(torch.distributed.get_rank()))


def numbers_from_the_whole(mesh: DeviceMesh) -> tuple[sharded.Result, list[str]]:
    """The whole program is given to bind, which runs the pass with its check."""
    program = PROGRAM.clone()
    program.graph_module = sharded.own_parameters(program)
    result = sharded.on_rank(program, mesh, tokens(torch.distributed.get_rank()))
    return result, [entry.text for entry in program.history]


def lowered_numbers(mesh: DeviceMesh) -> sharded.Result:
    """Through the functional collectives."""
    program = part(mesh)
    run(program, [f"lower-exchange{{group={mesh.get_group('ep').group_name}}}"])
    assert not any("moeify.all_to_all" in str(node.target) for node in program.graph.nodes)
    return sharded.on_rank(program, mesh, tokens(torch.distributed.get_rank()))


def training(mesh: DeviceMesh) -> tuple[dict[str, Tensor], list[float]]:
    """Some steps with clipped gradients: the weights after them and the norms before clipping.

    By momentum: these random losses leave gradients that are rounding alone, which AdamW scales up to whole steps. A
    language model under AdamW is below.
    """
    module = bind(part(mesh), mesh).train()
    optimizer = torch.optim.SGD(module.parameters(), RATE, momentum=0.9)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        sharded.loss_of(module(tokens(torch.distributed.get_rank(), step))).backward()
        sync_gradients(module)
        norms.append(clip_gradients(module, 1.0))
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}, norms


def language_model_alone(file: Path, size: int) -> tuple[dict[str, Tensor], list[float]]:
    """The steps of all ranks in one process: the weights and the mean loss of each step."""
    program = _read(file)
    module = sharded.TrainableGraph(program.graph_module, program.graph)
    return _steps(module, lambda step: torch.stack([_loss(module, rank, step) for rank in range(size)]).mean())


def language_model(mesh: DeviceMesh, file: Path) -> tuple[dict[str, Tensor], list[float]]:
    """The same on this rank's sequences, from the file."""
    module = bind(_read(file), mesh)
    rank = torch.distributed.get_rank()
    return _steps(module, lambda step: _loss(module, rank, step), lambda: sync_gradients(module))


def _read(file: Path) -> Program:
    program, _ = read_graph(file)
    return sharded.distinct(program, scale=0.01)


def _loss(module: torch.nn.Module, rank: int, step: int) -> Tensor:
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))
    output = module(ids[:, :-1], torch.ones_like(ids[:, :-1]))
    logits = flat(output)[0]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _steps(module: torch.nn.Module, loss_at: Callable[[int], Tensor], after: Callable[[], None] = lambda: None) -> Any:
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_at(step % 2)
        loss.backward()
        after()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {name: p.detach() for name, p in module.named_parameters()}, losses


def fsdp(mesh: DeviceMesh) -> tuple[sharded.Result, float]:
    """One backward pass with every parameter cut by FSDP2: the gradients put together again, and their norm."""
    module = fully_shard(bind(part(mesh), mesh), mesh)
    output = module(tokens(torch.distributed.get_rank()))
    (sharded.loss_of(output) / mesh.size()).backward()
    norm = gradient_norm(module)
    gradients = {name: p.grad.full_tensor() for name, p in module.named_parameters() if p.grad is not None}
    return sharded.Result(output.detach(), gradients), norm


def fault(mesh: DeviceMesh, kind: str, wrong: tuple[int, ...], seconds: float, folder: Path) -> str:
    """The ranks ``wrong`` go wrong. Returns only for kinds that are no fault."""
    rank = torch.distributed.get_rank()
    odd = rank in wrong
    program = part(mesh, FLOATS) if kind == "NaN input" else part(mesh)
    torch.distributed.barrier()  # from here on, time counts
    if odd and kind == "absent":
        _hang()
    module = bind(program, mesh, timeout=seconds)
    x = torch.randn(1, programs.D, 2, 3) if kind == "NaN input" else tokens(rank)
    module(x)
    checkpoint.save(module, mesh, folder, 1)
    if odd and kind in ("killed", "two killed", "killed with the store"):
        os.kill(os.getpid(), signal.SIGKILL)
    if odd and kind == "hanging":
        _hang()
    if odd and kind == "raises":
        binding_of(module).groups.board.stop(rank, "the data ended")
        _hang()
    if odd and kind == "NaN input":
        x[0, 0, 0, 0] = float("nan")
    if odd and kind == "no tokens":
        x = torch.zeros(2, 0, dtype=torch.int64)
    loss = sharded.loss_of(module(x))
    if odd and kind == "killed in backward":
        os.kill(os.getpid(), signal.SIGKILL)
    if odd and kind == "NaN loss":
        loss = loss * float("nan")
    loss.backward()
    sync_gradients(module)
    return "went on"


def differing(mesh: DeviceMesh, kinds: list[str]) -> dict[str, str]:
    """What bind says when the last rank, or every one, has come with the wrong program. One after the other."""
    rank = torch.distributed.get_rank()
    odd = rank == mesh.size() - 1
    said = {}
    for kind in kinds:
        program = part(mesh)
        if odd and kind == "another graph":
            program = part(mesh, SWITCH)
        if odd and kind == "another dtype":
            program.graph_module.bfloat16()
        if kind == "another world size" or (odd and kind == "one with another world size"):
            program = part(mesh, ranks=4, rank=rank)
        if odd and kind == "another rank's experts":
            program = part(mesh, rank=0)
        try:
            bind(program, mesh)
        except DistributedError as error:
            said[kind] = str(error)
    return said


def _hang() -> None:
    """Neither runs nor ends, until it is killed."""
    os.kill(os.getpid(), signal.SIGSTOP)


def binding_again(mesh: DeviceMesh) -> tuple[str, sharded.Result]:
    """A bind that fails on the last rank before it meets the others, and one that does not."""
    rank, last = torch.distributed.get_rank(), mesh.size() - 1
    try:
        bind(part(mesh) if rank != last else PROGRAM.clone(), mesh, options="mode=none")
        raise AssertionError("bound")
    except MoeifyError as error:
        said = str(error)
    return said, sharded.on_rank(part(mesh), mesh, tokens(rank))
