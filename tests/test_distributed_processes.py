"""Expert parallelism on real processes over gloo: numbers, training, and every way in which a rank can go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moeify.distributed import checkpoint_whole
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
    assert [texts for _, texts in results] == [
        ["shard-experts{ranks=2}"],
        ["shard-experts{ranks=2,rank=1,check=false}"],
    ]
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


def test_a_bind_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    """The ranks do not get out of step, and nobody hears the old reasons again."""
    results = ranks.results(ranks.run(rank_work.binding_again, 3, tmp_path))
    refused = "shard-experts: there is no mode 'none'"
    assert results[2][0].startswith(refused)
    for said, _ in results[:2]:
        assert said == f"rank 2 stopped: {refused}\n  hint: cure rank 2 and start again"
    sharded.compare([one for _, one in results], expected(3), sharded.experts_of(rank_work.PROGRAM), 3, BOUND)


SAME = "\n  hint: start every rank from the same file, with the same options and versions"
DIFFERENT = {
    "another dtype": "the ranks do not run one program: dtype is float32 on ranks 0, 1 and bfloat16 on rank 2" + SAME,
    "another graph": "the ranks do not run one program: top-k is 2 on ranks 0, 1 and 1 on rank 2" + SAME,
    "another world size": (
        "this graph was made for an 'ep' group of 4 ranks, but the bound group has 3\n"
        "  hint: start 4 ranks per group, or bind an unsharded program"
    ),
    "one with another world size": (
        "the ranks do not run one program: number of ranks in the graph is 3 on ranks 0, 1 and 4 on rank 2" + SAME
    ),
    "another rank's experts": (
        "rank 2 is number 2 of its group and holds the experts of number 0\n"
        "  hint: shard the program on each rank with its own rank, or bind an unsharded one"
    ),
}


def test_ranks_that_differ(tmp_path: Path) -> None:
    assert ranks.results(ranks.run(rank_work.differing, 3, tmp_path, list(DIFFERENT))) == [DIFFERENT] * 3


SECONDS = 8.0  # of an exchange: more than what a loaded machine needs, and two of the faults take as long


@dataclass(frozen=True)
class Fault:
    """What the ranks beside the wrong ones hear, and how those end: by a signal (None where the test kills them), or
    with the same words."""

    text: str
    code: int | None = 1
    wrong: tuple[int, ...] = (2,)
    size: int = 3
    bound: bool = True


FAULTS = {
    "killed": Fault(
        "rank 2 ended during an exchange\n  at: layers.0\n"
        "  hint: look at the log of rank 2, and start again from the last checkpoint",
        -9,
    ),
    "killed in backward": Fault(
        "rank 2 ended during an exchange\n  at: layers.1\n"
        "  hint: look at the log of rank 2, and start again from the last checkpoint",
        -9,
    ),
    "two killed": Fault(
        "ranks 2, 3 ended during an exchange\n  at: layers.0\n"
        "  hint: look at the log of ranks 2, 3, and start again from the last checkpoint",
        -9,
        (2, 3),
        4,
    ),
    "killed with the store": Fault(
        "the process that holds the ranks' store has ended: rank 0, or torchrun where that started the ranks\n"
        "  at: layers.0\n  hint: look at the log of rank 0, and start again from the last checkpoint",
        -9,
        (0,),
    ),
    "hanging": Fault(
        "rank 2 did not come to an exchange within 8 s\n  at: layers.0\n"
        "  hint: see what rank 2 was doing, or give bind a longer timeout",
        None,
    ),
    "raises": Fault("rank 2 stopped: the data ended\n  at: layers.0\n  hint: cure rank 2 and start again", None),
    "absent": Fault("rank 2 did not come to bind within 8 s\n  hint: look at the log of rank 2", None, bound=False),
    "NaN loss": Fault(
        "the gradients of rank 2 hold NaN or infinity\n"
        "  hint: look at the data and the loss of rank 2; no gradient was spread"
    ),
    "NaN input": Fault(
        "rank 2 stopped: input 0 of rank 2 holds NaN or infinity\n  at: block\n  hint: cure rank 2 and start again"
    ),
}
OWN = {
    "NaN input": "input 0 of rank 2 holds NaN or infinity\n"
    "  hint: look at the data of that rank, or bind with check_inputs=False"
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults(tmp_path: Path, kind: str) -> None:
    """Every rank that is not wrong says the same, in time, and what was saved before is whole."""
    fault = FAULTS[kind]
    outcomes = ranks.run(
        rank_work.fault, fault.size, tmp_path / "ranks", kind, fault.wrong, SECONDS, tmp_path / "kept",
        stuck=fault.wrong if fault.code is None else (), first_holds_store=kind == "killed with the store",
    )  # fmt: skip
    for rank, outcome in enumerate(outcomes):
        if rank not in fault.wrong:
            error = outcome.error
            if kind == "killed with the store":  # which may be before the others know that the checkpoint is whole
                error = error.replace("at: checkpoint", "at: layers.0")
            assert (outcome.code, error) == (1, fault.text), rank
        elif fault.code == 1:
            assert (outcome.code, outcome.error) == (1, OWN.get(kind, fault.text))
        else:
            assert outcome.code == fault.code
    if fault.bound:
        program = rank_work.FLOATS if kind == "NaN input" else rank_work.PROGRAM
        program = program.clone()
        wanted = sharded.own_parameters(program)
        program.graph_module = sharded.own_parameters(program)
        for parameter in program.graph_module.parameters():
            parameter.detach().zero_()
        checkpoint_whole.load_program(program, tmp_path / "kept" / "step-00000001")
        for name, value in program.graph_module.named_parameters():
            assert torch.equal(value, wanted.get_parameter(name)), name


def test_no_tokens_on_a_rank_is_no_fault(tmp_path: Path) -> None:
    outcomes = ranks.run(rank_work.fault, 3, tmp_path, "no tokens", (2,), SECONDS, tmp_path / "kept")
    assert ranks.results(outcomes) == ["went on"] * 3
