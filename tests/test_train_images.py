"""``moeify train`` and ``moeify.run`` on folders of images: classes from sub-folders, reading, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.api.load import read_graph
from moeify.cli.main import main
from moeify.data import images
from moeify.data.examples import Options, open_data
from moeify.distributed import runner_data
from moeify.errors import UnreadableFile
from moeify.ir.program import Program
from tests import runs

image = pytest.importorskip("PIL.Image")

COLOURS = {"blue": (20, 30, 200), "green": (20, 200, 30), "red": (200, 30, 20)}
EACH = 12  # images of a class


class Colours(nn.Module):
    """Scores [batch, classes] of an image in patches of 4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.head = nn.Linear(12, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        return self.head((x + self.mlp(x)).mean(1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``moe.pt2`` of 3 classes and ``small.pt2`` of 2; ``dense.pt2`` of the first; images in ``train/`` by class and in
    ``flat/``."""
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    for name, classes in (("dense", 3), ("dense_small", 2)):
        program = torch.export.export(Colours(classes).eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / f"{name}.pt2")
    for dense, name in (("dense", "moe"), ("dense_small", "small")):
        moeify.convert_file(folder / f"{dense}.pt2", folder / f"{name}.pt2", moeify.Recipe(experts=2, top_k=1))
    draw = torch.Generator().manual_seed(0)
    for number in range(3 * EACH):
        name, colour = list(COLOURS.items())[number // EACH]
        spread = torch.randint(-20, 20, (10, 12, 3), generator=draw) + torch.tensor(colour)
        picture = image.fromarray(spread.clamp(0, 255).byte().numpy())
        for file in (folder / "train" / name / f"{number}.png", folder / "flat" / f"{number}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    return folder


@pytest.fixture(scope="module")
def program(place: Path) -> Program:
    return read_graph(place / "moe.pt2")[0]


def test_it_learns_the_classes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of the folder is held out, and it is not the last class alone."""
    run = ["train", str(place / "moe.pt2"), "--data", str(place / "train"), "--steps", "25", "--lr", "0.02"]
    run += ["--test-part", "0.25", "-o", str(tmp_path / "out.pt2")]
    assert main([*run, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["classes"] == list(COLOURS)
    assert said["examples"] == 27
    assert [one["accuracy"] for one in said["held_out"]][-1] == 1.0
    assert said["notes"] == ["images scaled to [-1, 1]: --image-mean and --image-std say others"]
    (block,) = said["routing"]["blocks"]
    assert block["tokens"] == 9 * 4  # patches
    assert list(block["label_loads"]) == ["0", "1", "2"]
    assert main([*run, "--image-mean", "0.4", "--image-std", "0.5,0.4,0.3", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "classes      blue, green, red\n" in shown
    assert "labels       experts tell 0." in shown
    assert "images scaled" not in shown


def test_a_folder_without_classes_is_for_a_teacher(place: Path) -> None:
    report = moeify.train(place / "moe.pt2", place / "flat", teacher=place / "dense.pt2", steps=1)
    assert report.loss_is == "mse to the teacher"
    assert (report.examples, report.classes) == (32, ())


def test_the_scaling_of_the_teacher(place: Path, tmp_path: Path) -> None:
    """Where beside the model there is none."""
    (tmp_path / "dense.pt2").write_bytes((place / "dense.pt2").read_bytes())
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps({"image_mean": [0.1], "image_std": [0.5]}))
    report = moeify.train(place / "moe.pt2", place / "flat", teacher=tmp_path / "dense.pt2", steps=1)
    assert report.notes == [f"images scaled as {config} says"]


def test_one_class(place: Path, tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    for file in (place / "train" / "red").iterdir():
        (tmp_path / "red" / file.name).write_bytes(file.read_bytes())
    report = moeify.train(place / "moe.pt2", tmp_path, steps=1)
    assert report.classes == ("red",)
    assert f"{tmp_path} has 1 classes: they are the first of the model's 3 scores" in report.notes


def by_pixels(batch: Tensor, labels: Tensor) -> dict[tuple[float, ...], int]:
    return {tuple(one.flatten().tolist()): int(label) for one, label in zip(batch, labels)}


def test_images_are_those_of_the_other_commands(place: Path, program: Program) -> None:
    options = Options(image_mean=(0.1, 0.2, 0.3), image_std=(0.5,), batch=5, seed=3)
    found = runner_data.read(place / "train", program, options)
    assert (found.count, found.classes) == (3 * EACH, tuple(COLOURS))
    batch = found.take([0, EACH, 2 * EACH])
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["image"].shape == (3, 3, 8, 8)
    assert found.inputs == ("image",)
    data = open_data(place / "train", program, options)
    assert data.labels is not None
    theirs = by_pixels(torch.cat([batch[0] for batch in data.batches]), torch.cat(list(data.labels)))
    whole = found.take(range(found.count))
    assert by_pixels(whole["image"], whole["labels"]) == theirs
    mixed = found.mixed()
    again = mixed.take(range(found.count))
    assert by_pixels(again["image"], again["labels"]) == theirs
    assert len(set(again["labels"][:9].tolist())) > 1


def test_images_stay_in_memory_where_they_are_few(
    place: Path, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bytes: 3 x 8 x 8 an image."""
    for number, most in enumerate((2 * 192, 2 * 192 - 1)):
        monkeypatch.setattr(images, "KEPT", most)
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("0.png", "1.png"):
            (folder / name).write_bytes((place / "flat" / name).read_bytes())
        found = runner_data.read(folder, program, Options())
        first = found.take([0, 1])["image"]
        (folder / "0.png").write_text("no image")
        if number == 0:
            assert torch.equal(found.take([1, 0])["image"].flip(0), first)
        else:
            with pytest.raises(UnreadableFile, match=r"cannot read the image .*0\.png"):
                found.take([0])


def copied(place: Path, to: Path) -> Path:
    for file in (place / "train").rglob("*.png"):
        (to / file.parent.name).mkdir(parents=True, exist_ok=True)
        (to / file.parent.name / file.name).write_bytes(file.read_bytes())
    return to


def test_refusals(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(model: str, data: Path, *more: object) -> str:
        words = ["train", place / f"{model}.pt2", "--data", data, "--steps", 1, "-o", tmp_path / "out.pt2", *more]
        assert main([str(word) for word in words]) in (1, 2, 3)
        return capsys.readouterr().err

    train, flat, other = place / "train", place / "flat", copied(place, tmp_path / "other")
    (other / "red").rename(other / "pink")
    assert said("small", train) == (
        f"error: {train} has 3 classes and the model scores for 2: none for 'red', which is number 2 from 0\n"
        "  hint: the sub-folders are the classes, in the order of their names: leave some out\n"
    )
    assert said("moe", train, "--test", other).splitlines()[0] == (
        f"error: the classes of {train} and {other} are not the same: only {train} has red, only {other} has pink"
    )
    assert said("moe", train, "--test", flat).startswith(f"error: {train} has labels and {flat} has none\n")
    assert "the data have no labels for its classes\n  hint: give --loss pkg.mod:function, --teacher" in said(
        "moe", flat
    )
    (other / "none").mkdir()
    (other / ".hidden").mkdir()
    assert said("moe", other).startswith(
        f"error: there is no image in {other / 'none'}, and every sub-folder of {other} is a class\n"
    )
    (other / "none").rmdir()
    for file in (other / "blue").iterdir():
        file.write_bytes(file.read_bytes()[:60])
    assert said("moe", other).startswith(f"error: cannot read the image {other / 'blue'}/")
    assert said("moe", tmp_path / "nowhere").startswith("error: ")
    (tmp_path / "empty").mkdir()
    assert said("moe", tmp_path / "empty").startswith(f"error: there is no image in the folder {tmp_path / 'empty'}\n")


def test_the_runner_trains_on_the_classes(place: Path, tmp_path: Path) -> None:
    """Without a loss of the user's own."""
    words = [place / "moe.pt2", "--data", place / "train", "--batch", 6, "--lr", 0.02, "--json"]
    trained = runs.run(1, tmp_path, *words, "--steps", 20)[0].json()["losses"]
    assert trained[-1] < trained[0] / 2
    evaluated = runs.run(1, tmp_path, *words)[0].json()
    assert (evaluated["examples"], evaluated["terms"]) == (3 * EACH, 3 * EACH)
    assert evaluated["loss"] == pytest.approx(trained[0], rel=0.2)
