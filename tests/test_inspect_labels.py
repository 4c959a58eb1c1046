"""What experts tell of labels: the figures by hand, and ``moeify inspect --routing`` on images, tensors and a text."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import moeify
from moeify.api.load import read_graph
from moeify.cli.main import main
from moeify.training.information import contingency, information, information_by_chance
from moeify.training.row_labels import row_labels
from tests.test_routing import Two


def test_information_by_chance_is_the_mean_over_all_orders() -> None:
    experts, labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([4, 4, 0, 0, 1, 3])
    found = [
        information(contingency(experts, torch.tensor(order), 3, 5))
        for order in itertools.permutations(labels.tolist())
    ]
    table = contingency(experts, labels, 3, 5)
    assert information_by_chance(table) == pytest.approx(sum(found) / len(found), rel=1e-12)
    assert information(table) > information_by_chance(table)


def test_labels_of_examples_and_of_some_blocks() -> None:
    """Two examples of two tokens: the expert tells the label of each in the first block, of one block alone."""
    model = Two()
    with moeify.routing(model) as seen:
        for classes in ([5, 900], [5, 31], [900, -1]):
            seen.next(labels={"0": torch.tensor(classes)})
            first = [{5: [0], 900: [1], 31: [2], -1: [3]}[one] for one in classes for _ in range(2)]
            model.run(first, [[0]] * 4)
    first, second = seen.report().blocks
    shares = torch.tensor([2, 2, 1]) / 5
    assert first.mutual_information == pytest.approx(-float((shares * shares.log()).sum()))
    assert first.label_information == pytest.approx(1)
    assert 0 < first.mutual_information_by_chance < first.mutual_information
    assert first.label_loads == {5: [1, 0, 0, 0], 31: [0, 0, 1, 0], 900: [0, 1, 0, 0]}
    assert dict(first.figures())["mutual_information"] == first.mutual_information
    assert (second.mutual_information, second.label_loads) == (None, None)


def test_more_labels_than_are_told_one_by_one() -> None:
    model = Two()
    with moeify.routing(model) as seen:
        seen.next(labels=torch.arange(101))
        model.run([[0]] * 101, [[number % 2] for number in range(101)])
    first, second = seen.report().blocks
    assert (first.mutual_information, first.label_loads) == (pytest.approx(0, abs=1e-12), None)
    # Every label is told once: chance explains all that the second block's experts seem to tell.
    assert second.mutual_information == pytest.approx(second.mutual_information_by_chance, rel=1e-9)
    assert second.mutual_information == pytest.approx(math.log(2), rel=1e-3)


class Patches(nn.Module):
    """Two blocks of an image [batch, 1, 4, 4]: one sees the patches example by example, one patch by patch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, 2)
        self.first, self.second = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = (x + self.first(x)).transpose(0, 1)
        return (x + self.second(x)).mean(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``patches.pt2`` and black and white images in two folders; ``text.pt2``, which reads bytes, and a text."""
    made = tmp_path_factory.mktemp("labels")
    torch.manual_seed(0)
    torch.save(
        nn.Sequential(nn.Embedding(128, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)), made / "text.pt"
    )
    moeify.convert_file(
        made / "text.pt", made / "text.pt2", moeify.Recipe(experts=2), inputs=["input=int64[batch=2,seq=6]"]
    )
    batch = torch.export.Dim("batch")
    program = torch.export.export(Patches().eval(), (torch.randn(2, 1, 4, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, made / "dense.pt2")
    moeify.convert_file(made / "dense.pt2", made / "patches.pt2", moeify.Recipe(experts=2, top_k=1))
    (made / "t.txt").write_text("to be or not to be that is the question " * 9)
    return made


def routed(folder: Path, model: str, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    assert main(["inspect", str(folder / model), "--routing", str(data), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_images_by_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, grey in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for number in range(6):
            image.new("L", (4, 4), abs(grey - number)).save(tmp_path / name / f"{number}.png")
    said = routed(folder, "patches.pt2", tmp_path, capsys, "--image-mean", "0.5", "--image-std", "0.1")
    assert (said["labels"], said["classes"], said["notes"]) == ("the folder of its image", ["black", "white"], [])
    first, second = said["blocks"]
    assert (first["path"], first["tokens"]) == ("first", 48)
    assert first["mutual_information"] == pytest.approx(math.log(2))  # plain images: all patches go one way
    assert second["mutual_information"] is None
    assert (
        main(["inspect", str(folder / "patches.pt2"), "--routing", str(tmp_path), "--plot", str(tmp_path / "p.png")])
        == 0
    )
    shown = capsys.readouterr().out
    assert "experts by label in first" in shown
    assert "\n  black  " in shown


def test_labels_of_a_tensor_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of examples; of tokens, where some have none; and of neither."""
    ids = torch.randint(128, (20, 6), generator=torch.Generator().manual_seed(0))
    by_token = torch.where(ids < 9, -100, ids % 3)
    told = {}
    for name, labels in (("examples", ids[:, 0] % 4), ("tokens", by_token), ("floats", ids[:, 0].float())):
        save_file({"input": ids, "labels": labels}, tmp_path / f"{name}.safetensors")
        said = routed(folder, "text.pt2", tmp_path / f"{name}.safetensors", capsys)
        told[name] = (said["labels"], said["blocks"][0])
    assert told["examples"][0] == told["tokens"][0] == "the tensor 'labels' of the data"
    assert told["floats"][0] == "the token itself"
    model = moeify.load(folder / "text.pt2")
    with moeify.routing(model) as seen, torch.no_grad():
        for start in range(0, 20, 5):  # in any order and any batches
            rows = slice(start, start + 5)
            seen.next(labels=by_token[rows])
            model(ids[rows])
    assert told["tokens"][1]["mutual_information"] == pytest.approx(seen.report().blocks[0].mutual_information)
    assert list(told["examples"][1]["label_loads"]) == ["0", "1", "2", "3"]


def test_tokens_of_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = routed(folder, "text.pt2", folder / "t.txt", capsys, "--tokenizer", "bytes", "--sequence", "6")
    assert said["labels"] == "the token itself"
    (block,) = said["blocks"]
    assert set(map(int, block["label_loads"])) == set((folder / "t.txt").read_bytes())
    assert block["mutual_information_by_chance"] < block["mutual_information"] <= math.log(2)


def test_labels_of_rows_that_are_not_told_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, metadata = read_graph(folder / "patches.pt2")
    known = row_labels(program, {entry["anchor"]: entry["path"] for entry in metadata["report"]["blocks"]})
    assert (known.by_example, known.tokens) == (("first",), {})
    save_file({"image": torch.randn(6, 1, 4, 4), "labels": torch.zeros(6, 4).long()}, tmp_path / "d.safetensors")
    said = routed(folder, "patches.pt2", tmp_path / "d.safetensors", capsys)
    assert said["labels"] is None
    assert said["notes"][0].startswith("which label belongs to which row of a block is not known")
