"""lower-to-aten: each operator's function, the graph, ranks that have no moeify, gradients, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moeify.backends.exporting import export
from moeify.errors import Refused
from moeify.ir.modes import TrainableGraph
from moeify.ir.plain_ops import PLAIN
from moeify.ir.printer import program_text
from moeify.ir.program import Program
from moeify.passes.lower_exchange import LowerExchange
from moeify.passes.lower_to_aten import LowerToAten
from moeify.passes.shard_experts import ShardExperts
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS, is_moe
from moeify.pipeline.runner import run
from tests import programs, rank_work, ranks, sharded
from tests.test_route import routed

_moe = torch.ops.moeify
R, E, D, F = 9, 4, 6, 5
COUNTS = torch.tensor([4, 0, 3, 2])
NONE = torch.zeros(E, dtype=torch.int64)


def of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def experts(count: int, gated: bool) -> list[Any]:
    gate, gate_bias = (of(count, F, D), of(count, F)) if gated else (None, None)
    return [of(count, F, D), gate, of(count, D, F), of(count, F), gate_bias, of(count, D), "gelu"]


def cases() -> dict[str, tuple[Any, list[Any]]]:
    torch.manual_seed(0)
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])
    order = chosen.reshape(-1).argsort(stable=True)
    there = torch.tensor([[4, 0, 3], [0, 1, 1]])
    return {
        "permute": (_moe.permute, [of(4, D), chosen, E]),
        "permute nothing": (_moe.permute, [of(0, D), chosen[:0], E]),
        "unpermute": (_moe.unpermute, [of(8, D), order, of(4, 2)]),
        "unpermute nothing": (_moe.unpermute, [of(0, D), order[:0], of(0, 2)]),
        "transpose_groups": (_moe.transpose_groups, [of(R, D), there]),
        "transpose_groups of one": (_moe.transpose_groups, [of(R, D), COUNTS.unsqueeze(0)]),
        "transpose_groups of nothing": (_moe.transpose_groups, [of(0, D), there * 0]),
        "local_counts": (_moe.local_counts, [there, of(2, F, D)]),
        "pad_groups": (_moe.pad_groups, [of(R, D), COUNTS, 3]),
        "pad_groups of nothing": (_moe.pad_groups, [of(0, D), NONE, 3]),
        "unpad_groups": (_moe.unpad_groups, [of(E, 3, D), COUNTS, R]),
        "unpad_groups of nothing": (_moe.unpad_groups, [of(E, 3, D), NONE, 0]),
        "grouped_linear": (_moe.grouped_linear, [of(R, D), COUNTS, of(E, F, D), of(E, F)]),
        "grouped_linear, no bias": (_moe.grouped_linear, [of(R, D), COUNTS, of(E, F, D), None]),
        "experts": (_moe.experts, [of(R, D), COUNTS, *experts(E, gated=False)]),
        "experts, gated": (_moe.experts, [of(R, D), COUNTS, *experts(E, gated=True)]),
        "experts, no rows": (_moe.experts, [of(0, D), NONE, *experts(E, gated=True)]),
        "no experts": (_moe.experts, [of(0, D), NONE[:0], *experts(0, gated=True)]),
    }


@pytest.mark.parametrize("name", cases())
def test_every_operator(name: str) -> None:
    """Values and the gradients of everything that has one, in float64."""
    operator, given = cases()[name]
    wanted = [x for x in given if isinstance(x, Tensor) and x.requires_grad]

    def values(call: Any) -> list[Tensor]:
        outputs = call(*given)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        loss = sum(sharded.loss_of(x) for x in outputs if x.requires_grad)
        if not isinstance(loss, Tensor):
            return outputs
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return [*outputs, *gradients]

    for got, want in zip(values(PLAIN[operator.default]), values(operator), strict=True):
        torch.testing.assert_close(got, want)


def lowered(program: Program, **options: Any) -> Program:
    """One rank's part, with nothing of moeify left, for the group that torch calls the world."""
    twin = program.clone()
    twin.graph_module = sharded.own_parameters(twin)
    ShardExperts(**options).rewrite(twin, Log())
    LowerExchange("0").apply(twin, Log())
    LowerToAten().apply(twin, Log())
    return twin


def test_graph(golden) -> None:
    made = programs.gated()
    routed(made)
    made = lowered(made, ranks=4, mode="dropless")
    for rule in ALWAYS:
        rule(made)
    golden("lower-to-aten", program_text(made, "lower-to-aten"))


def test_ranks_that_have_no_moeify(tmp_path: Path) -> None:
    """Two processes load what torch.export saved and agree with one process."""
    modes = {"dropless": {}, "capacity": {"factor": 8.0, "tokens": 12}}  # buffers that no row finds full
    commands = []
    for rank in range(2):
        files = [str(tmp_path / f"{mode}-{rank}.pt2") for mode in modes]
        for file, (mode, options) in zip(files, modes.items()):
            exported = export(lowered(rank_work.PROGRAM, ranks=2, rank=rank, mode=mode, **options))
            assert not [node for node in exported.graph.nodes if is_moe(node)]
            torch.export.save(exported, file)
        torch.save(rank_work.tokens(rank), tmp_path / f"in-{rank}.pt")
        script = [sys.executable, str(Path(__file__).parent / "without_moeify.py"), str(rank), "2"]
        places = [str(tmp_path / name) for name in ("store", f"in-{rank}.pt", f"out-{rank}.pt")]
        commands.append([*script, *places, *files])
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    for rank, want in enumerate(sharded.alone(rank_work.PROGRAM, [rank_work.tokens(rank) for rank in range(2)])):
        for got in torch.load(tmp_path / f"out-{rank}.pt"):
            assert sharded.relative(got, want.output) <= 1e-6  # the bar of expert parallelism, in float32


def numbers(mesh: DeviceMesh) -> sharded.Result:
    """Without bind, as a rank without moeify would do it."""
    program = rank_work.part(mesh)
    run(program, [f"lower-exchange{{group={mesh.get_group('ep').group_name}}}", "lower-to-aten"])
    assert program.history[-1].lines == ("12 operators opened",)  # two blocks
    assert not [node for node in program.graph.nodes if is_moe(node)]
    program.materialise()
    module = TrainableGraph(program.graph_module, program.graph)
    output = module(rank_work.tokens(mesh.get_rank()))
    sharded.loss_of(output).backward()
    experts, gradients = sharded.experts_of(program), {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None and name not in experts:
            continue  # nothing reads it, on any rank
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name not in experts:
            torch.distributed.all_reduce(gradient)
        gradients[name] = gradient / mesh.size()
    return sharded.Result(output.detach(), gradients)


def test_outputs_and_gradients_on_ranks(tmp_path: Path) -> None:
    """Three ranks for four experts: the last one has none."""
    results = ranks.results(ranks.run(numbers, 3, tmp_path))
    expected = sharded.alone(rank_work.PROGRAM, [rank_work.tokens(rank) for rank in range(3)])
    sharded.compare(results, expected, sharded.experts_of(rank_work.PROGRAM), 3, 1e-6)


def test_a_program_on_one_rank() -> None:
    made = rank_work.PROGRAM.clone()
    x = rank_work.tokens(0)
    want = TrainableGraph(made.graph_module, made.graph)(x)
    twin = made.clone()
    twin.graph_module = sharded.own_parameters(twin)
    LowerToAten().apply(twin, Log())
    assert not [node for node in twin.graph.nodes if is_moe(node)]
    torch.testing.assert_close(TrainableGraph(twin.graph_module, twin.graph)(x), want)


def test_exchanges_that_are_left() -> None:
    made = programs.gated()
    routed(made)
    ShardExperts(ranks=2).rewrite(made, Log())
    with pytest.raises(Refused) as caught:
        LowerToAten().apply(made, Log())
    assert str(caught.value) == (
        "%all_to_all_even is an exchange between ranks\n  hint: run lower-exchange{group=NAME} before"
    )


def test_router_noise() -> None:
    made = programs.gated(router="noisy-topk")
    routed(made)
    with pytest.raises(Refused) as caught:
        LowerToAten().apply(made, Log())
    assert str(caught.value) == (
        "%normal_like (moeify.normal_like.default) has no form in ATen\n  hint: choose a router without noise"
    )
