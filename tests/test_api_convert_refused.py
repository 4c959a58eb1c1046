"""Conversions that are refused: recipes, data and models that do not fit, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moeify
from moeify import Recipe
from moeify.api import convert_file
from moeify.errors import BadInputSpec, BadRecipe, NoBlocks, NotDivisible, UnknownName, UsageError, VerificationFailed
from tests.encoder_files import SPEC, dense_file

dense = pytest.fixture(scope="module")(dense_file)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"method": "coppy"}, UnknownName, "there is no method named 'coppy'\n  hint: did you mean 'copy'?"),
        (
            {"router": "swich"},
            UnknownName,
            "there is no router named 'swich'\n  hint: did you mean 'switch'?",
        ),
        ({"blocks": "nowhere.*"}, NoBlocks, None),
        ({"method": "granular{shards=3}", "experts": 6, "top_k": 3}, NotDivisible, None),
        ({"router": "switch", "top_k": 2}, BadRecipe, None),
    ],
)
def test_refused_recipes_write_nothing(dense: Path, tmp_path: Path, fields, error, text) -> None:
    with pytest.raises(error) as caught:
        convert_file(dense, tmp_path / "o.pt2", Recipe(**fields), inputs=SPEC)
    if text:
        assert str(caught.value) == text
    assert list(tmp_path.iterdir()) == []


def test_no_block_shows_the_nearest_misses(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), tmp_path / "mlp.pt")
    with pytest.raises(NoBlocks) as error:
        convert_file(tmp_path / "mlp.pt", None, Recipe())
    assert error.value.what.startswith("no feed-forward block to convert; nearest misses:\n    ")
    assert error.value.exit_code == 1


def test_wrong_method_implementation_is_caught_and_nothing_is_written(dense, tmp_path, monkeypatch) -> None:
    from moeify.experts.drop import Drop

    monkeypatch.setattr(Drop, "exact", True)  # a method that promises what it does not keep
    with pytest.raises(VerificationFailed) as error:
        convert_file(dense, tmp_path / "o.pt2", Recipe(method="drop"), inputs=SPEC)
    assert error.value.what.startswith(
        "drop with softmax-topk promises to keep the function, and the relative error is "
    )
    assert error.value.where == "layers.0"
    assert list(tmp_path.iterdir()) == []


def test_data_that_does_not_fit(dense: Path, tmp_path: Path) -> None:
    torch.save([torch.randn(2, 3, 8)], tmp_path / "d.pt")
    with pytest.raises(BadInputSpec) as error:
        convert_file(dense, None, Recipe(), inputs=SPEC, data=tmp_path / "d.pt")
    assert "has shape (2, 3, 8), the model reads " in error.value.what


class Positions(nn.Module):
    """Runs on eight tokens at most."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(8, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.table(torch.arange(x.shape[1]))
        return x + self.down(torch.relu(self.up(x)))


def test_data_the_model_does_not_run_on() -> None:
    model, inputs = Positions(), (torch.randn(2, 4, 16),)
    with pytest.raises(BadInputSpec) as error:
        moeify.convert(model, inputs=inputs, data=(torch.randn(2, 9, 16),))
    assert error.value.what == "the model does not run on the data: index out of range in self"
    with pytest.raises(BadInputSpec) as error:
        moeify.convert(model, inputs=inputs, data=(torch.randn(2, 9),))
    assert error.value.what.startswith("data: x has shape (2, 9), the model reads x=float32[")


def test_a_proof_on_nothing_but_nan_is_none() -> None:
    model, inputs = Positions(), (torch.randn(2, 4, 16),)
    with pytest.raises(VerificationFailed) as error:
        moeify.convert(model, inputs=inputs, data=(torch.full((2, 4, 16), 3e38),))  # finite, and its sums are not
    assert error.value.what == (
        "the dense model gives nothing but NaN and infinity on these inputs, so nothing can be compared"
    )


def test_convert_in_python_refuses_nonsense() -> None:
    with pytest.raises(UsageError) as error:
        moeify.convert(nn.Linear(2, 2), form="onnx")
    assert str(error.value) == "there is no form 'onnx'\n  hint: choose 'module' or 'graph'"
    with pytest.raises(UsageError) as error:
        moeify.convert(nn.Linear(2, 2), Recipe(), experts=3)
    assert str(error.value) == "give a recipe or its fields, not both"
