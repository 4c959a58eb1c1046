"""Expert parallelism on threads: outputs and all gradients against one process, at sizes up to 64 ranks."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from moeify.distributed.binding import bind
from moeify.distributed.board import Board
from moeify.distributed.gradients import sync_gradients
from moeify.distributed.groups import named
from moeify.distributed.threads import run_ranks
from moeify.errors import DistributedError, NonFiniteValues, RankLost, RanksDiffer, UnboundRole
from moeify.ir.program import Program
from tests import programs, sharded
from tests.test_make_experts import MAKERS
from tests.test_route import routed

# Sums run in another order: over ranks instead of over all rows. The bar of expert parallelism, in float32.
BOUND = 1e-6


def program_of(maker: str, dtype: torch.dtype = torch.float32, **recipe) -> Program:
    made = MAKERS[maker](**recipe)
    routed(made)
    made = sharded.distinct(made)
    made.graph_module.to(dtype)
    return made


def inputs_of(maker: str, ranks: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    if maker == "images":
        return [torch.randn(1, programs.D, 2, 3 + rank % 3, dtype=dtype) for rank in range(ranks)]
    return [torch.randint(40, (2, 3 + rank % 4)) for rank in range(ranks)]


def check(made: Program, inputs: list[Tensor], ep: int, dp: int, bound: float, **options) -> None:
    expected = sharded.alone(made, inputs)
    parts = sharded.parts(made, ep, dp, **options)
    results = run_ranks(lambda groups: sharded.on_rank(parts[groups.rank], groups, inputs[groups.rank]), ep, dp)
    sharded.compare(results, expected, sharded.experts_of(made), ep, bound)


@pytest.mark.parametrize("ranks", [2, 6, 8])
@pytest.mark.parametrize("maker", ["plain", "shared-weights"])
def test_outputs_and_gradients(maker: str, ranks: int) -> None:
    """8 experts; of 6 ranks two have none."""
    made = program_of(maker, shared=1)
    check(made, inputs_of(maker, ranks), ranks, 1, BOUND)


def test_64_experts_on_64_ranks() -> None:
    check(program_of("gated", experts=64, top_k=4), inputs_of("gated", 64), 64, 1, BOUND)


@pytest.mark.parametrize("maker", sorted(MAKERS))
@pytest.mark.parametrize(("ep", "dp"), [(3, 1), (2, 2)])
def test_the_formula(maker: str, ep: int, dp: int) -> None:
    """In float64, where rounding hides nothing: 5 experts over 3 ranks are 2, 2 and 1."""
    experts = 5 if ep == 3 else 4
    made = program_of(maker, torch.float64, experts=experts)
    check(made, inputs_of(maker, ep * dp, torch.float64), ep, dp, 1e-12)


def test_a_rank_without_tokens() -> None:
    made = program_of("gated")
    inputs = [torch.randint(40, (2, size)) for size in (4, 0, 3)]
    check(made, inputs, 3, 1, BOUND)


def test_no_tokens_at_all() -> None:
    made = program_of("gated")
    parts = sharded.parts(made, 2)
    inputs = torch.zeros(2, 0, dtype=torch.int64)
    results = run_ranks(lambda groups: sharded.on_rank(parts[groups.rank], groups, inputs), 2)
    assert all(result.output.shape == (2, 0, 3) for result in results)
    assert not any(grad.any() for result in results for grad in result.gradients.values())


@pytest.mark.parametrize("maker", ["plain", "custom", "images"])
def test_capacity_without_drops_is_dropless(maker: str) -> None:
    made = program_of(maker, torch.float64)
    # As many rows as any rank could send to one expert.
    check(made, inputs_of(maker, 4, torch.float64), 4, 1, 1e-12, mode="capacity", factor=8.0, tokens=16)


class Limited(torch.nn.Module):
    """One rank's own mixture with local capacity, by a loop over tokens: the oracle of capacity mode with drops."""

    def __init__(self, made: Program, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.weights = dict(made.graph_module.named_parameters())

    def __call__(self, ids: Tensor) -> tuple[Tensor, int]:
        w, path = self.weights, "layers.0"
        x = w["embed.weight"][ids]
        normed = torch.nn.functional.layer_norm(
            x, (programs.D,), w[f"{path}.norm.weight"], w[f"{path}.norm.bias"]
        ).flatten(0, 1)
        gates, experts = (normed @ w[f"{path}.router.weight"].t()).sort(1, descending=True)
        gates = gates[:, :2].softmax(1)
        used = [0] * 8
        dropped = 0
        rows = []
        for token in range(normed.shape[0]):
            y = torch.zeros(programs.D, dtype=x.dtype)
            for k in range(2):
                e = int(experts[token, k])
                used[e] += 1
                if used[e] > self.capacity:
                    dropped += 1
                    continue
                hidden = torch.nn.functional.silu(w[f"{path}.experts.gate"][e] @ normed[token])
                hidden = hidden * (w[f"{path}.experts.up"][e] @ normed[token])
                y = y + gates[token, k] * (w[f"{path}.experts.down"][e] @ hidden)
            rows.append(y)
        mixed = torch.stack(rows).view_as(x)
        return torch.nn.functional.linear(x + mixed, w["head.weight"], w["head.bias"]), dropped


def test_capacity_with_drops_is_each_ranks_own_limit() -> None:
    made = program_of("gated", torch.float64)
    inputs = inputs_of("gated", 4)
    oracle = Limited(made, capacity=2)
    made.graph_module.zero_grad()
    outputs, dropped = zip(*(oracle(x) for x in inputs))
    assert sum(dropped) > 10
    (torch.stack([sharded.loss_of(y) for y in outputs]).sum() / 4).backward()
    gradients = {n: p.grad.clone() for n, p in made.graph_module.named_parameters() if p.grad is not None}
    made.graph_module.zero_grad()
    expected = [sharded.Result(y.detach(), gradients) for y in outputs]
    parts = sharded.parts(made, 4, mode="capacity", factor=1.0, tokens=8)
    results = run_ranks(lambda groups: sharded.on_rank(parts[groups.rank], groups, inputs[groups.rank]), 4)
    sharded.compare(results, expected, sharded.experts_of(made), 4, 1e-12)


def test_capacity_takes_other_numbers_of_tokens() -> None:
    """The buffers are part of the graph, so that a rank without tokens still fits to one with many."""
    made = program_of("gated", torch.float64)
    inputs = [torch.randint(40, (2, size)) for size in (0, 6)]
    check(made, inputs, 2, 1, 1e-12, mode="capacity", factor=8.0, tokens=12)


def test_dropless_keeps_the_order_of_rows() -> None:
    """Rows are sorted rank by rank and stably, so that each expert sees the rows of one process in its order. Only the
    sizes of its products differ, by which a matrix product may round otherwise: a few units of the last place."""
    made = program_of("plain", torch.float64)
    inputs = inputs_of("plain", 4)
    whole = made.graph_module
    parts = sharded.parts(made, 4)
    results = run_ranks(lambda groups: sharded.on_rank(parts[groups.rank], groups, inputs[groups.rank]), 4)
    for x, result in zip(inputs, results):
        torch.testing.assert_close(result.output, whole(x).detach(), rtol=1e-14, atol=1e-14)


def test_the_first_error_of_a_thread_is_raised_and_the_others_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the others have heard of it, and ended, before the thread that raised it goes on."""
    stop = Board.stop

    def slow(board: Board, rank: int, what: str) -> None:
        stop(board, rank, what)
        time.sleep(0.5)

    monkeypatch.setattr(Board, "stop", slow)
    made = program_of("gated")
    parts = sharded.parts(made, 3)
    told = {}

    def work(groups):
        if groups.rank == 1:
            raise ValueError("no more")
        try:
            sharded.on_rank(parts[groups.rank], groups, torch.randint(40, (2, 3)))
        except DistributedError as error:
            told[groups.rank] = str(error)
            raise

    with pytest.raises(ValueError, match="no more"):
        run_ranks(work, 3)
    text = "rank 1 stopped: ValueError: no more\n  hint: cure rank 1 and start again"
    assert told == {0: text, 2: text}


def test_a_thread_that_does_not_come() -> None:
    """It is named by all that wait for it."""
    told = {}

    def work(groups):
        if groups.rank == 2:
            return
        try:
            groups.experts.all_reduce(torch.ones(1), "layers.7")
        except RankLost as error:
            told[groups.rank] = str(error)

    run_ranks(work, 3, seconds=1)
    text = (
        "rank 2 did not come to an exchange within 1 s\n  at: layers.7\n"
        "  hint: see what rank 2 was doing, or give bind a longer timeout"
    )
    assert told == {0: text, 1: text}


def test_gradients_of_experts_alone() -> None:
    """Nothing else is trained: the same gradients as with the rest; and NaN is found, on the ranks that it came to."""
    made = program_of("gated")
    parts = sharded.parts(made, 2)
    inputs = inputs_of("gated", 2)
    want = [result.gradients for result in sharded.alone(made, inputs)]
    experts = sharded.experts_of(made)

    def work(groups, spoiled: float):
        part = parts[groups.rank].clone()
        module = bind(part, groups)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in experts)
            parameter.grad = None
        loss = sharded.loss_of(module(inputs[groups.rank]))
        (loss * spoiled if groups.rank == 1 else loss).backward()
        finite = all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
        try:
            sync_gradients(module)
        except NonFiniteValues as error:
            return finite, str(error)
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    for rank, found in enumerate(run_ranks(lambda groups: work(groups, 1.0), 2)):
        assert found.keys() == experts
        for name, grad in found.items():
            assert sharded.relative(grad, want[rank][name].chunk(2)[rank]) <= BOUND
    found = run_ranks(lambda groups: work(groups, float("nan")), 2)
    bad = [rank for rank, (finite, _) in enumerate(found) if not finite]
    assert bad
    assert {text.splitlines()[0] for _, text in found} == {f"the gradients of {named(bad)} hold NaN or infinity"}


def test_other_graphs_are_told_apart() -> None:
    made = program_of("gated")
    parts = sharded.parts(made, 4)
    odd = program_of("plain")
    parts[2] = sharded.parts(odd, 4)[2]

    with pytest.raises(RanksDiffer) as caught:
        run_ranks(lambda groups: sharded.on_rank(parts[groups.rank], groups, torch.randint(40, (2, 3))), 4)
    text = str(caught.value)
    assert text.startswith("the ranks do not run one program: graph is ")
    assert " on ranks 0, 1, 3 and " in text
    assert text.splitlines()[0].endswith(" on rank 2")


def test_a_graph_that_is_not_bound_says_so() -> None:
    (part,) = sharded.parts(program_of("gated"), 1)
    part.materialise()
    with pytest.raises(UnboundRole) as caught:
        part.run(torch.randint(40, (2, 3)))
    assert str(caught.value) == (
        "the graph exchanges rows with the group 'ep', which is bound to nothing in this process\n"
        "  at: layers.0\n"
        "  hint: call moeify.distributed.bind(program, mesh) and use the module that it returns"
    )
