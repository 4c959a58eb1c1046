"""Expert parallelism on real processes over gloo: numbers, training, and every way in which a rank can go wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import rank_work, ranks, sharded

BOUND = 1e-6  # the bar of expert parallelism, in float32


def expected(size: int) -> list[sharded.Result]:
    return sharded.alone(rank_work.PROGRAM, [rank_work.tokens(rank) for rank in range(size)])


@pytest.mark.parametrize(("size", "ep"), [(2, 2), (4, 4), (3, 3), (4, 2)])
def test_outputs_and_gradients(tmp_path: Path, size: int, ep: int) -> None:
    results = ranks.results(ranks.run(rank_work.numbers, size, tmp_path, ep=ep))
    sharded.compare(results, expected(size), sharded.experts_of(rank_work.PROGRAM), ep, BOUND)


def test_bind_takes_the_whole_program(tmp_path: Path) -> None:
    results = ranks.results(ranks.run(rank_work.numbers_from_the_whole, 2, tmp_path))
    assert [texts for _, texts in results] == [["shard-experts{ranks=2}"], ["shard-experts{ranks=2,rank=1}"]]
    experts = sharded.experts_of(rank_work.PROGRAM)
    sharded.compare([result for result, _ in results], expected(2), experts, 2, BOUND)


def trained_alone(size: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps in one process."""
    program = rank_work.PROGRAM.clone()
    module = sharded.TrainableGraph(sharded.own_parameters(program), program.graph).train()
    optimizer = torch.optim.SGD(module.parameters(), rank_work.RATE, momentum=0.9)
    norms = []
    for step in range(rank_work.STEPS):
        optimizer.zero_grad()
        losses = [sharded.loss_of(module(rank_work.tokens(rank, step))) for rank in range(size)]
        (torch.stack(losses).sum() / size).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)))
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}, norms


@pytest.mark.parametrize(("size", "ep"), [(2, 2), (4, 2)])
def test_training(tmp_path: Path, size: int, ep: int) -> None:
    weights, norms = trained_alone(size)
    experts = sharded.experts_of(rank_work.PROGRAM)
    for rank, (got, got_norms) in enumerate(ranks.results(ranks.run(rank_work.training, size, tmp_path, ep=ep))):
        assert got_norms == pytest.approx(norms, rel=1e-5)
        for name, whole in weights.items():
            each = whole.shape[0] // ep
            want = whole[rank % ep * each :][:each] if name in experts else whole
            assert sharded.relative(got[name], want) <= 1e-5, name


def test_fsdp_on_two_by_two(tmp_path: Path) -> None:
    results = ranks.results(ranks.run(rank_work.fsdp, 4, tmp_path, ep=2))
    want = expected(4)
    sharded.compare([result for result, _ in results], want, sharded.experts_of(rank_work.PROGRAM), 2, BOUND)
    norm = float(torch.stack([grad.double().square().sum() for grad in want[0].gradients.values()]).sum().sqrt())
    assert [norm for _, norm in results] == pytest.approx([norm] * 4, rel=1e-6)


# What the ranks beside the odd one hear, and the odd one itself where it can still say something.
SECONDS = 3.0
OTHERS = {
    "killed": (
        "rank 2 ended during an exchange\n  at: layers.0\n"
        "  hint: look at the log of rank 2, and start again from the last checkpoint"
    ),
    "killed in backward": (
        "rank 2 ended during an exchange\n  at: layers.1\n"
        "  hint: look at the log of rank 2, and start again from the last checkpoint"
    ),
    "hanging": (
        "rank 2 did not come to an exchange within 3 s\n  at: layers.0\n"
        "  hint: see what rank 2 was doing, or give bind a longer timeout"
    ),
    "raises": "rank 2 stopped: the data ended\n  at: layers.0\n  hint: cure rank 2 and start again",
    "absent": "rank 2 did not come to bind within 3 s\n  hint: look at the log of rank 2",
    "another dtype": (
        "the ranks do not run one program: dtype is float32 on ranks 0, 1 and bfloat16 on rank 2\n"
        "  hint: start every rank from the same file, with the same options and versions"
    ),
    "another graph": (
        "the ranks do not run one program: top-k is 2 on ranks 0, 1 and 1 on rank 2\n"
        "  hint: start every rank from the same file, with the same options and versions"
    ),
    "another world size": (
        "this graph was made for an 'ep' group of 4 ranks, but the bound group has 3\n"
        "  hint: start 4 ranks per group, or bind an unsharded program"
    ),
    "one with another world size": (
        "the ranks do not run one program: number of ranks in the graph is 3 on ranks 0, 1 and 4 on rank 2\n"
        "  hint: start every rank from the same file, with the same options and versions"
    ),
    "another rank's experts": (
        "rank 2 is number 2 of its group and holds the experts of number 0\n"
        "  hint: shard the program on each rank with its own rank, or bind an unsharded one"
    ),
    "NaN": (
        "the gradients of rank 2 hold NaN or infinity\n"
        "  hint: look at the data and the loss of rank 2; no gradient was spread"
    ),
}
ALIKE = ("another", "one with", "NaN")  # the odd rank hears it too


@pytest.mark.parametrize("kind", OTHERS)
def test_faults(tmp_path: Path, kind: str) -> None:
    outcomes = ranks.run(rank_work.fault, 3, tmp_path, kind, SECONDS)
    *others, odd = outcomes
    for outcome in others:
        assert (outcome.code, outcome.error) == (1, OTHERS[kind])
    if kind.startswith("killed"):
        assert odd.code == -9
    elif kind.startswith(ALIKE):
        assert (odd.code, odd.error) == (1, OTHERS[kind])
    else:
        assert odd.code is not None


def test_no_tokens_on_a_rank_is_no_fault(tmp_path: Path) -> None:
    outcomes = ranks.run(rank_work.fault, 3, tmp_path, "no tokens", SECONDS)
    assert ranks.results(outcomes) == ["went on"] * 3
