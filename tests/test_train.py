"""``moeify.train`` and ``moeify train``: it learns, a teacher repairs a split, a run that ends goes on where it was."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moeify
from moeify.api.train_options import TrainOptions, read_table
from moeify.cli.main import main
from moeify.distributed import checkpoint_folder
from moeify.distributed.schedule import Schedule
from moeify.errors import BadInputSpec, BadOption, BadRecipe, UsageError
from moeify.training.only import train_only
from tests import train_work

VOCABULARY, WIDTH, LENGTH = 128, 16, 8  # a token may be an ASCII character


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Language(nn.Module):
    """Scores of the next token from this one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCABULARY, WIDTH), Block()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.dropout = nn.Dropout(0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.dropout(self.embed(input_ids)))))


class Classes(nn.Module):
    """Scores [batch, classes] from [batch, sequence, width]."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Language models in ``copied.pt2`` (with router losses) and ``split.pt2``, a classifier in ``classes.pt2``, the
    dense ones beside them, and data."""
    made = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    language = Language()
    with torch.no_grad():
        language.head.weight.mul_(4)  # so that an expert left out shows
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=draw)
    for name, module, example in (
        ("dense", language, ids),
        ("dense_classes", Classes(), torch.randn(2, 4, WIDTH, generator=draw)),
    ):
        sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        torch.export.save(
            torch.export.export(module.eval(), (example,), dynamic_shapes=(sizes,), strict=False), made / f"{name}.pt2"
        )
    for dense, name, recipe in (
        ("dense", "copied", moeify.Recipe(experts=4, top_k=2, router_losses=("switch", "z"))),
        ("dense", "split", moeify.Recipe(method="split-random", experts=4, top_k=1)),
        ("dense_classes", "classes", moeify.Recipe(experts=2, top_k=1)),
    ):
        moeify.convert_file(made / f"{dense}.pt2", made / f"{name}.pt2", recipe)
    # A chain of 20 tokens: three times the one before, and one.
    first = torch.randint(20, (40, 1), generator=draw)
    chain = [first]
    for _ in range(LENGTH - 1):
        chain.append((3 * chain[-1] + 1) % 20)
    mark = torch.zeros(40)
    mark[17] = 1
    save_file({"input_ids": torch.cat(chain, 1), "mark": mark}, made / "data.safetensors")
    (made / "text.txt").write_text("it is a truth universally acknowledged " * 20)
    return made


def words(folder: Path, model: str = "copied", data: str = "data.safetensors") -> list[str]:
    return ["train", str(folder / f"{model}.pt2"), "--data", str(folder / data), "--batch", "8", "--lr", "0.01"]


def state(path: Path) -> dict[str, Tensor]:
    return dict(moeify.load(path).state_dict())


def test_it_learns_and_writes_what_it_has_learnt(folder: Path, tmp_path: Path) -> None:
    """The next token is a function of this one: the loss, 4.9 where all are alike, must fall to a tenth."""
    output = tmp_path / "trained.pt2"
    ids = load_file(folder / "data.safetensors")["input_ids"]
    report = moeify.train(folder / "copied.pt2", {"input_ids": ids}, output, steps=40, lr=3e-2, eval_every=20)
    before, between, after = report.held_out
    assert (before.step, between.step, after.step, after.examples) == (0, 20, 40, 4)
    assert before.loss is not None
    assert after.loss is not None
    assert before.loss > 4.5
    assert after.loss < 0.45
    assert after.perplexity == pytest.approx(math.exp(after.loss))
    assert set(report.run.router_losses) == {"switch", "z"}
    assert report.routing is not None
    assert len(report.routing.blocks[0].load) == 4
    with torch.no_grad():
        logits = moeify.load(output)(ids[-4:])
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[-4:, 1:].flatten())
    assert float(loss) == pytest.approx(after.loss, rel=1e-5)
    assert not (tmp_path / "trained.checkpoints").exists()
    assert any("40 steps on data from Python" in note for note in moeify.load(output).moeify_report.notes)


def test_a_teacher_repairs_a_split(folder: Path) -> None:
    """Without labels, on tokens drawn at random."""
    ids = torch.randint(VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(1))
    report = moeify.train(
        folder / "split.pt2", {"input_ids": ids}, teacher=folder / "dense.pt2", steps=60, lr=1e-2, batch=16, only="ffn"
    )
    (before,), (after,) = (one.against_teacher for one in (report.held_out[0], report.held_out[-1]))
    assert before.divergence is not None
    assert after.divergence is not None
    assert before.agreement is not None
    assert after.agreement is not None
    assert after.divergence < before.divergence / 3
    assert after.agreement > before.agreement
    old = state(folder / "split.pt2")
    changed = {name for name, value in report.module.state_dict().items() if not torch.equal(value, old[name])}
    assert changed
    assert all(name.startswith("block.mlp.") for name in changed)


@pytest.mark.parametrize("distance", ["mse", "cosine", "mixed"])
def test_other_distances_to_a_teacher(folder: Path, distance: str) -> None:
    """``mixed`` is half of the distance by default and half of the loss of next tokens."""
    ids = load_file(folder / "data.safetensors")["input_ids"]
    options = {"distill_weight": 0.5, "temperature": 2.0} if distance == "mixed" else {"distill": distance}
    report = moeify.train(
        folder / "split.pt2", {"input_ids": ids}, teacher=folder / "dense.pt2", steps=15, lr=1e-2, **options
    )
    assert report.run.losses[-1] < 0.7 * report.run.losses[0]


def test_classes_from_labels(folder: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(4, (80,), generator=draw)
    x = torch.randn(80, 4, WIDTH, generator=draw) + 2 * nn.functional.one_hot(labels, WIDTH)[:, None]
    whole, parts = (
        moeify.train(folder / "classes.pt2", {"x": x, "labels": labels}, steps=20, lr=1e-2, batch=16, accumulate=n)
        for n in (1, 4)
    )
    before, after = whole.held_out
    assert before.accuracy is not None
    assert after.accuracy is not None
    assert after.perplexity is None
    assert after.accuracy >= 0.75 > before.accuracy
    # A batch in parts is the batch but for rounding, which grows step by step.
    assert parts.run.losses[:3] == pytest.approx(whole.run.losses[:3], rel=1e-5)
    assert parts.run.norms[:3] == pytest.approx(whole.run.norms[:3], rel=1e-4)


def test_the_rate_over_a_run() -> None:
    schedule = Schedule(20, rate=1.0, warmup=4, decay="cosine")
    assert [schedule.rate_at(step) for step in (0, 1, 3, 4, 12)] == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.5])
    assert 0 < schedule.rate_at(19) < 0.01
    assert Schedule(20, rate=1.0, warmup=2).rate_at(19) == 1.0


def test_a_run_goes_on_where_it_was(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a signal in the middle: the weights in the end are those of a run that nothing has stopped."""
    kept = tmp_path / "first.checkpoints"
    run = [*words(folder), "--steps", "6", "--loss", "tests.train_work:is_interrupted"]
    first, second = [*run, "-o", str(tmp_path / "first.pt2")], [*run, "-o", str(tmp_path / "second.pt2")]
    monkeypatch.setattr(train_work, "_calls", 0)
    monkeypatch.setattr(train_work, "stop_at", 3)
    with pytest.raises(SystemExit) as ended:
        main(first)
    assert ended.value.code == 143
    assert checkpoint_folder.steps(kept) == [3]
    assert not (tmp_path / "first.pt2").exists()
    assert "stopped      by SIGTERM after step 3; --resume goes on" in capsys.readouterr().out

    assert main([*first, "--resume", "--lr", "0.02", "--seed", "1"]) == 2
    assert capsys.readouterr().err == (
        f"error: {kept / 'step-00000003'} was made by another run: seed was 0, now 1; lr was 0.01, now 0.02\n"
        "  hint: go on with the same data and the same options, or start in another folder\n"
    )
    assert main([*first, "--resume"]) == main(second) == 0
    assert not kept.exists()
    a, b = state(tmp_path / "first.pt2"), state(tmp_path / "second.pt2")
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=1e-6, atol=1e-6), name


def test_a_loss_that_is_not_a_number(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run ends at the step, and the checkpoint before stays; one mark in 36 examples comes in 5 steps of 8."""
    kept = tmp_path / "kept"
    run = [*words(folder), "--loss", "tests.train_work:breaks_on_a_mark", "--checkpoints", str(kept)]
    assert main([*run, "--save-every", "1", "--test-part", "0", "-o", str(tmp_path / "out.pt2")]) == 1
    step = checkpoint_folder.steps(kept)[-1]
    error = capsys.readouterr().err
    assert error.startswith(f"error: the loss is NaN or infinity\n  at: step {step + 1}\n")
    assert error.endswith(f"; the last good checkpoint is {checkpoint_folder.path_of(kept, step)}\n")
    assert not (tmp_path / "out.pt2").exists()


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options from a file, a flag that wins, JSON and a plot."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('experts = 4\n[train]\nsteps = 9\ntokenizer = "bytes"\nrouter-losses = ["z"]\nlr = 1\n')
    assert moeify.Recipe.from_toml(recipe) == moeify.Recipe(experts=4)
    output, plot = tmp_path / "out.pt2", tmp_path / "plot.png"
    run = ["train", str(folder / "copied.pt2"), "--data", str(folder / "text.txt"), "--sequence", "16", "--steps", "4"]
    assert main([*run, "--recipe", str(recipe), "--lr", "1e-3", "-o", str(output), "--plot", str(plot), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], len(said["losses"]), said["learning_rates"][0]) == (4, 4, 1e-3)
    assert list(said["router_losses"]) == ["z"]
    assert [one["step"] for one in said["held_out"]] == [0, 4]
    assert said["output"] == str(output)
    assert plot.stat().st_size > 1000
    assert moeify.load(output).moeify_report.recipe["router_losses"] == ["z"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("steps = 3", "has no table [train]"),
        ("[train]\nstep = 3", "has no field 'step'"),
        ("[train]\nsteps = '3'", "steps is '3', which is of another type"),
        ("[train]\nrouter-losses = 'z'", "router-losses is 'z', which is of another type"),
        ("[train]\nimage-mean = ['z']", "image-mean is ['z'], which is of another type"),
    ],
)
def test_a_file_of_options_that_is_wrong(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(BadRecipe, match=re.escape(error)):
        read_table(tmp_path / "recipe.toml")


def test_lists_in_a_file_and_in_a_checkpoint(tmp_path: Path) -> None:
    """A run that goes on holds what it is told against JSON."""
    (tmp_path / "recipe.toml").write_text("[train]\nrouter-losses = ['z']\nimage-mean = [0.5, 1]\n")
    told = read_table(tmp_path / "recipe.toml")
    assert told == {"router_losses": ("z",), "image_mean": (0.5, 1)}
    facts = TrainOptions(**told).facts()
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"only": "heads"}, "only is 'heads'"),
        ({"decay": "linear"}, "there is no decay 'linear'"),
        ({"batch": 8, "accumulate": 3}, "a batch of 8 is not cut into 3 equal parts"),
        ({"distill_weight": 0.0}, "distill-weight must be above 0"),
        ({"test_part": 1.0}, "test-part is 1"),
    ],
)
def test_options_that_are_wrong(options: dict, error: str) -> None:
    with pytest.raises(BadOption, match=error):
        TrainOptions(**options)


def test_nothing_to_learn_from(folder: Path) -> None:
    x = torch.randn(20, 4, WIDTH)
    for options, error in (
        ({}, "the data have no labels for its classes"),
        ({"distill": "mse"}, "there is no teacher to learn from"),
        ({"teacher": folder / "dense_classes.pt2", "distill": "kl"}, "predict nothing, so there is no KL"),
        ({"teacher": folder / "dense_classes.pt2", "distill_weight": 0.5}, "there is no loss of the task"),
    ):
        with pytest.raises(UsageError, match=error):
            moeify.train(folder / "classes.pt2", {"x": x}, steps=1, **options)
    with pytest.raises(BadInputSpec, match="a label is not one of 0 to 3"):
        moeify.train(folder / "classes.pt2", {"x": x, "labels": torch.full((20,), 4)}, steps=1)
    with pytest.raises(UsageError, match="the outputs of the teacher"):
        moeify.train(folder / "classes.pt2", {"x": x}, steps=1, teacher=Classes(3))
    with pytest.raises(UsageError, match="with --only routers there is no parameter"):
        train_only(Classes(), ["block.mlp"], "routers")
