"""``moeify train --consistency``: two forward passes of each batch, held against the sums written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moeify
from moeify.api.load import read_graph
from moeify.api.train_options import TrainOptions
from moeify.cli.main import main
from moeify.distributed import training
from moeify.distributed.alone import alone, bind_alone
from moeify.distributed.binding import bind
from moeify.distributed.groups import Groups
from moeify.distributed.runner_data import Examples
from moeify.distributed.runner_group import Ranks
from moeify.distributed.runner_loss import Consistency
from moeify.distributed.schedule import Schedule
from moeify.distributed.threads import run_ranks
from moeify.errors import BadOption
from moeify.training.consistency import consistency
from tests import sharded

WORDS, WIDTH = 16, 12


class Language(nn.Module):
    """Scores of the next token from this one alone; with ``scores`` off, what they are made of."""

    def __init__(self, dropout: float, scores: bool = True) -> None:
        super().__init__()
        self.embed, self.dropout = nn.Embedding(WORDS, WIDTH), nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.head = nn.Linear(WIDTH, WORDS if scores else 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embed(ids))
        return self.head(x + self.mlp(x))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files by what is random in them: ``dropout``, ``thor`` (its experts, which are not alike), ``both`` (of two,
    which are), ``nothing``; and ``values``, which predicts nothing."""
    made = tmp_path_factory.mktemp("consistency")
    thor = moeify.Recipe(method="noise{std=0.3,fraction=1.0}", experts=4, top_k=1, router="random")
    biases = moeify.Recipe(experts=2, top_k=1, router="sigmoid-bias{gamma=0.5}", router_losses=("switch",))
    for name, dropout, recipe in (
        ("dropout", 0.2, biases),
        ("thor", 0.0, thor),
        ("both", 0.0, moeify.Recipe(experts=2, top_k=2, router="random")),
        ("nothing", 0.0, moeify.Recipe(experts=2, top_k=1)),
        ("values", 0.2, moeify.Recipe(experts=2, top_k=1)),
    ):
        torch.manual_seed(0)
        dense = Language(dropout, scores=name != "values")
        torch.save(dense, made / f"{name}.pt")
        moeify.convert_file(
            made / f"{name}.pt", made / f"{name}.pt2", recipe, inputs=["ids=int64[batch=2,seq=4]"], allow=[__name__]
        )
    return made


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(WORDS, (8, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_the_sums_written_out(folder: Path, ids: Tensor, parts: int) -> None:
    """Means over two passes of the loss and of the router losses, and the weight times how far they are apart. Biases
    move by gamma, once."""
    options = {"steps": 1, "batch": 8, "clip": 0.0, "test_part": 0.0, "accumulate": parts}
    run = moeify.train(folder / "dropout.pt2", {"ids": ids}, consistency=3.0, **options)
    model = moeify.load(folder / "dropout.pt2").train()
    which = Examples({"ids": ids}, ("ids",)).shuffled(0, 8)
    torch.manual_seed(0)
    loss, switch, apart = (torch.zeros(()) for _ in range(3))
    for part in ids[which].chunk(parts):
        scores = []
        for _ in range(2):
            scores.append(model(part))
            loss = loss + F.cross_entropy(scores[-1][:, :-1].flatten(0, 1), part[:, 1:].flatten()) / (2 * parts)
            switch = switch + moeify.losses(model).total / (2 * parts)
        apart = apart + consistency(*scores) / parts
    (loss + switch + 3 * apart).backward()
    loss, switch, apart = loss.detach(), switch.detach(), apart.detach()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert run.run.losses == pytest.approx([float(loss)], rel=1e-5)
    assert run.run.router_losses["switch"] == pytest.approx([float(switch)], rel=1e-5)
    assert run.run.consistency == pytest.approx([float(apart)], rel=1e-5)
    assert run.run.norms == pytest.approx([float(norm)], rel=1e-5)
    assert float(apart) > 0.01
    bias = run.module.state_dict()["mlp.router.bias"]
    assert bias.abs().tolist() == [0.5, 0.5]
    assert run.loss_is == "next tokens + 3 x consistency"
    assert run.routing is not None  # watched on what was trained on, as nothing is held out
    assert run.routing.blocks[0].tokens == ids.numel()


def test_experts_learn_to_agree(folder: Path, ids: Tensor) -> None:
    last = {}
    for weight in (1e-9, 5.0):
        report = moeify.train(
            folder / "thor.pt2", {"ids": ids}, consistency=weight, steps=30, batch=8, lr=1e-2, test_part=0.0
        )
        last[weight] = sum(report.run.consistency[-10:]) / 10
    assert last[5.0] < last[1e-9] / 3


def test_in_bfloat16(folder: Path, ids: Tensor) -> None:
    report = moeify.train(folder / "thor.pt2", {"ids": ids}, consistency=1.0, steps=2, amp=True, test_part=0.0)
    assert all(0 < one < 20 for one in report.run.consistency)
    assert report.to_dict()["consistency"] == report.run.consistency


def test_two_ranks_are_as_one(folder: Path, ids: Tensor) -> None:
    """Of 3 examples one rank has one and the other two. Both experts are always on, so nothing depends on the draw."""
    program = read_graph(folder / "both.pt2")[0]

    def loss(output: Tensor, batch: dict[str, Tensor], counted: int) -> tuple[Tensor, float]:
        return output.square().sum() * (counted > 0), float(output[..., 0].numel() * (counted > 0))

    def divergence(first: Tensor, second: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return (first * second).abs().sum(), torch.tensor(float(first[..., 0].numel()))

    def run(module: nn.Module, ranks: Ranks) -> training.Trained:
        examples = Examples({"ids": ids[:3]}, ("ids",))
        return training.train(
            module, ranks, examples, loss, Schedule(1, batch=3, clip=0.0), consistency=Consistency(2.0, divergence)
        )

    shares = sharded.parts(program, 2)

    def on_rank(groups: Groups) -> training.Trained:
        return run(bind(shares[groups.rank], groups), Ranks(None, groups, groups.experts))

    one = alone()
    whole = run(bind_alone(program, one), one)
    for made in run_ranks(on_rank, 2):
        assert made.losses == pytest.approx(whole.losses, rel=1e-5)
        assert made.consistency == pytest.approx(whole.consistency, rel=1e-5)
        assert made.norms == pytest.approx(whole.norms, rel=1e-5)


def test_the_command(folder: Path, tmp_path: Path, ids: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ids": ids}, tmp_path / "data.pt")

    def run(model: str, *more: str) -> tuple[int, str]:
        words = ["train", str(folder / f"{model}.pt2"), "--data", str(tmp_path / "data.pt"), "--steps", "2"]
        code = main([*words, "--test-part", "0", "-o", str(tmp_path / "out.pt2"), "--consistency", "1", *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = run("thor")
    assert code == 0
    assert "nats between two passes" in said
    assert run("nothing")[1].endswith(
        "error: nothing in the model draws a random number in training, so two passes cannot differ\n"
        "  hint: leave the consistency out, or convert with a router that draws ('moeify routers --table')\n"
    )
    teacher = ("--teacher", str(folder / "values.pt"), "--allow", __name__)
    assert "error: the outputs of the model predict nothing, so two passes have nothing" in run("values", *teacher)[1]
    with pytest.raises(BadOption, match="the weight of the consistency is -1"):
        TrainOptions(consistency=-1.0)
