"""One process against many ranks: the same rows, the same losses, outputs and gradients compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from moeify.distributed.binding import bind
from moeify.distributed.gradients import sync_gradients
from moeify.distributed.groups import Groups
from moeify.ir.modes import TrainableGraph
from moeify.ir.program import Program
from moeify.passes.shard_experts import ShardExperts
from moeify.pipeline.base import Log


@dataclass
class Result:
    """Of one process, or of one rank: the output on its rows, and the gradients of the mean loss over all ranks."""

    output: Tensor
    gradients: dict[str, Tensor]


def distinct(program: Program, scale: float = 0.3) -> Program:
    """Every weight with noise of its own: between equal experts a router would have no gradient to compare."""
    program.materialise()
    program.graph_module = own_parameters(program)  # the tests' captures are shared
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in program.graph_module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return program


def own_parameters(program: Program) -> fx.GraphModule:
    """The graph over parameters that no other program shares."""
    return copy.deepcopy(program.graph_module)


def experts_of(program: Program) -> frozenset[str]:
    """The names of the stacked weights."""
    return frozenset(name for name, _ in program.graph_module.named_parameters() if ".experts." in name)


def loss_of(output: Tensor) -> Tensor:
    """Depends on every value differently; zero for no tokens."""
    return (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum() + output.square().sum()


def alone(program: Program, inputs: list[Tensor]) -> list[Result]:
    """What each rank should get: the whole program on each one's rows, the gradients of the mean."""
    module = TrainableGraph(program.graph_module, program.graph)
    module.zero_grad()
    outputs = [module(x) for x in inputs]
    (torch.stack([loss_of(output) for output in outputs]).sum() / len(inputs)).backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return [Result(output.detach(), gradients) for output in outputs]


def parts(program: Program, ep: int, dp: int = 1, **options: Any) -> list[Program]:
    """The program of every rank, without the check by export. Fake tensors are not for threads: call it outside."""
    made = []
    for rank in range(dp * ep):
        twin = program.clone()
        twin.graph_module = own_parameters(twin)
        ShardExperts(ranks=ep, rank=rank % ep, **options).rewrite(twin, Log())
        made.append(twin)
    return made


def on_rank(program: Program, mesh: DeviceMesh | Groups, x: Tensor) -> Result:
    """This rank's part; ``program`` is sharded for it."""
    module = bind(program, mesh)
    output = module(x)
    loss_of(output).backward()
    sync_gradients(module)
    return Result(output.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest value."""
    if not reference.numel():
        return 0.0 if value.shape == reference.shape else float("inf")
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def compare(results: list[Result], expected: list[Result], experts: frozenset[str], ep: int, bound: float) -> None:
    """Outputs and every gradient; a rank's experts against their part of the whole."""
    for rank, (got, want) in enumerate(zip(results, expected, strict=True)):
        assert relative(got.output, want.output) <= bound, rank
        assert got.gradients.keys() == want.gradients.keys()
        for name, whole in want.gradients.items():
            part = whole
            if name in experts:
                each = -(-whole.shape[0] // ep)
                part = whole[(rank % ep) * each : (rank % ep + 1) * each]
                assert got.gradients[name].shape == part.shape
            # Relative to the whole gradient: an expert without rows has none of its own.
            scale = float(whole.abs().max().clamp(min=1e-30))
            error = float((got.gradients[name] - part).abs().max()) / scale if part.numel() else 0.0
            assert error <= bound, (rank, name, error)
