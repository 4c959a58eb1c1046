"""``moeify profile``, ``convert --profile`` and ``convert --data`` end to end, and the same from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.cli.main import main

WORDS = "it is a truth universally acknowledged that a single man in possession of a good fortune must want a wife. "
TEXT = ["--tokenizer", "bytes", "--sequence", "16"]
SPLIT = ["--method", "split-coactivation", "--experts", "4", "--top-k", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte language model of two feed-forward layers, a text, and the ids of that text as tensors."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("profile")
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="relu", norm_first=True)
    model = nn.Sequential(nn.Embedding(128, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    torch.save(model.eval(), path / "dense.pt")
    (path / "book.txt").write_text(WORDS * 8)
    (path / "short.txt").write_text(WORDS[:20])
    return path


@pytest.fixture(scope="module")
def profile(folder: Path) -> Path:
    assert (
        main(["profile", f"{folder}/dense.pt", "--data", f"{folder}/book.txt", *TEXT, "-o", f"{folder}/p.profile"]) == 0
    )
    return folder / "p.profile"


def test_what_it_prints(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    words = ["profile", f"{folder}/dense.pt", "--data", f"{folder}/book.txt", *TEXT, "--gradients"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{folder}/dense.pt: 2 feed-forward blocks profiled in" in out
    assert "  block       rows  units  active  in top 25 %  dead  most frequent\n" in out
    assert "  1.layers.0  " in out
    assert "gradients      of half the squared output" in out
    assert out.endswith("wrote          dense.profile\n")
    assert (tmp_path / "dense.profile").is_file()


def test_json(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["profile", f"{folder}/dense.pt", "--data", f"{folder}/book.txt", *TEXT, "-o", f"{tmp_path}/p.profile"]
    assert main([*words, "--json", "--tokens", "200", "--blocks", "last:1", "--top", "8", "--batch", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    (block,) = said["blocks"]
    assert (block["path"], block["units"], block["tokens"]) == ("1.layers.1", 32, 256)  # 4 pieces of 16 at a time
    assert (said["batches"], said["top"], said["facts"]["tokens"]) == (4, 8, "256")
    assert 0 < block["active"] < 1
    assert 0.25 < block["top_quarter"] <= 1


def test_a_method_that_needs_data_says_what_to_give(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", f"{folder}/dense.pt", *SPLIT, "-o", f"{tmp_path}/o.pt2"]) == 1
    err = capsys.readouterr().err
    assert "no data were given" in err
    assert "--data" in err
    assert list(tmp_path.iterdir()) == []


def test_convert_with_a_profile_and_with_data_give_the_same(
    folder: Path, profile: Path, tmp_path: Path, capsys
) -> None:
    """The profile's own batches are then what is verified on."""
    given = {"p": ["--profile", str(profile)], "d": ["--data", f"{folder}/book.txt", *TEXT]}
    said = {}
    for name, words in given.items():
        command = ["convert", f"{folder}/dense.pt", *SPLIT, *words, "-o", f"{tmp_path}/{name}.pt2", "--json"]
        assert main(command) == 0, capsys.readouterr().err
        said[name] = json.loads(capsys.readouterr().out)
        assert any(f"profiled on {folder}/book.txt" in note for note in said[name]["notes"])
    first, second = (moeify.load(tmp_path / f"{name}.pt2").state_dict() for name in given)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert said["p"]["blocks"][0]["relative_error"] == said["d"]["blocks"][0]["relative_error"]


def test_a_text_to_verify_on_alone(folder: Path, tmp_path: Path, capsys) -> None:
    command = ["convert", f"{folder}/dense.pt", "--data", f"{folder}/book.txt", *TEXT, "-o", f"{tmp_path}/o.pt2"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verified"]
    assert not any("profiled" in note for note in said["notes"])


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["profile", "{f}/dense.pt"], 2, "--data"),
        (["profile", "{f}/dense.pt", "--data", "{f}/none.txt"], 3, "there is no file"),
        (["profile", "{f}/dense.pt", "--data", "{f}/short.txt", *TEXT], 2, "rows are too few"),
        (["profile", "{f}/dense.pt", "--data", "{f}/book.txt", *TEXT, "-o", "no/such/p.profile"], 1, "does not exist"),
        (["profile", "{f}/dense.pt", "--data", "{f}/book.txt", "--image-mean", "a"], 2, "cannot read --image-mean"),
        (["convert", "{f}/dense.pt", "--tokenizer", "bytes"], 2, "--tokenizer says how data are read"),
        (["convert", "{f}/dense.pt", "--profile", "none.profile"], 3, "there is no profile"),
        (["convert", "{f}/dense.pt", "--data", "none.npz"], 3, "there is no file"),
    ],
)
def test_errors(folder: Path, tmp_path: Path, capsys, monkeypatch, words: list[str], code: int, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.format(f=folder) for word in words]) == code
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_from_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = nn.Sequential(Residual(), Residual()), torch.randn(30, 6, 16)
    path, inputs = tmp_path / "p.profile", ["float32[batch=2,seq=6,16]"]
    made = moeify.profile(model, list(rows.split(10)), inputs=inputs, output=path, samples=50)
    assert list(made.blocks) == ["0.mlp", "1.mlp"]
    with torch.no_grad():
        h = model[0].mlp[:2](rows).flatten(0, 1)
    torch.testing.assert_close(made.blocks["0.mlp"].mean_F, h.mean(0))
    ways = ({"profile": made}, {"profile": path}, {"data": list(rows.split(10))})
    for way in ways:
        twin = nn.Sequential(Residual(), Residual())
        twin.load_state_dict(model.state_dict())
        done = moeify.convert(twin, inputs=inputs, method="split-coactivation", experts=4, top_k=4, **way)
        assert done.moeify_report.verified, way
        assert done(rows).isfinite().all()
    other = nn.Sequential(Residual(), Residual())
    with pytest.raises(moeify.MoeifyError, match="of other weights"):
        moeify.convert(other, inputs=inputs, method="split-coactivation", experts=4, profile=made)


def test_a_profile_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(256, (8, 8, 3), generator=draw, dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.layer = nn.Conv2d(3, 16, 2, 2), Residual()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.layer(self.patch(pixels).flatten(2).transpose(1, 2))

    made = moeify.profile(Patches(), tmp_path, inputs=["float32[batch=2,3,8,8]"], image_mean=(0.5,), image_std=(0.25,))
    assert made.blocks["layer.mlp"].tokens == 6 * 16
    assert made.facts["source"] == f"{tmp_path}, 6 images"
