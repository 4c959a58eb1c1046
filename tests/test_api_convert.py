"""The whole way from a file to a verified artefact, and what loads, trains, compares and reads it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import moeify
from moeify import Recipe
from moeify.api import convert_file, inspect_file, verify_files
from moeify.api.verify import compare
from moeify.errors import BadInputSpec, UnknownName, UnreadableFile
from tests.encoder_files import SPEC, dense_file

dense = pytest.fixture(scope="module")(dense_file)


@pytest.fixture(scope="module")
def converted(dense: Path) -> Path:
    output = dense.with_name("moe.pt2")
    convert_file(dense, output, Recipe(experts=4, top_k=2), inputs=SPEC)
    return output


def test_report_of_an_exact_conversion(dense: Path, tmp_path: Path) -> None:
    report = convert_file(dense, tmp_path / "o.pt2", Recipe(experts=4, top_k=2), inputs=SPEC)
    assert report.verified
    assert report.max_relative_error < 1e-5
    assert [(b.path, b.converted, b.activation, b.d_ff, b.d_expert) for b in report.blocks] == [
        ("layers.0", True, "relu", 32, 32),
        ("layers.1", True, "relu", 32, 32),
    ]
    block = report.blocks[0]
    assert block.parameters_before == 2 * 16 * 32 + 16 + 32
    assert block.parameters_after == 4 * block.parameters_before + 4 * 16
    assert block.flops_per_token_before == 2 * 2 * 16 * 32
    assert block.flops_per_token_after == 2 * block.flops_per_token_before + 2 * 4 * 16
    assert report.parameters_after - report.parameters_before == 2 * (3 * block.parameters_before + 4 * 16)
    with zipfile.ZipFile(tmp_path / "o.pt2") as archive:
        name = next(n for n in archive.namelist() if n.endswith("moeify.json"))
        data = json.loads(archive.read(name))
    assert data["report"]["verified"] is True
    assert data["recipe"]["experts"] == 4
    assert str(tmp_path) not in json.dumps(data["report"]["blocks"])


def test_loaded_graph_equals_the_dense_model_at_other_sizes(dense: Path, converted: Path) -> None:
    model = torch.load(dense, weights_only=False).eval()
    loaded = moeify.load(converted)
    for shape in ((2, 4, 16), (3, 7, 16), (1, 1, 16)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))


def test_shared_experts_of_one_block_are_reported_and_exact(dense: Path) -> None:
    recipe = Recipe(experts=4, overrides=(("layers.1", {"shared": 2, "shared_gate": True}),))
    report = convert_file(dense, None, recipe, inputs=SPEC)
    assert [block.shared for block in report.blocks] == [0, 2]
    assert report.max_relative_error < 1e-5
    first, second = (block.parameters_after for block in report.blocks)
    assert second - first == 2 * (2 * 16 * 32 + 32) + 16 + 16  # two wide copies, one down bias, one gate row


def test_loaded_graph_trains(converted: Path) -> None:
    model = moeify.load(converted)
    names = set(model.state_dict())
    x, y = torch.randn(8, 6, 16), torch.randn(8, 6, 16)
    assert not model.training
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))  # dropout is on
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.eval()
    losses = []
    for _ in range(5):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert set(model.state_dict()) == names
    assert {n.rpartition(".")[2] for n in names if ".experts." in n} == {"up", "down", "up_bias", "down_bias"}


def test_verify_compares_any_two(dense: Path, converted: Path, tmp_path: Path) -> None:
    same = verify_files(dense, converted, inputs=SPEC)
    assert same.agree
    assert same.max_relative_error < 1e-5
    torch.save({"src": torch.randn(2, 3, 16)}, tmp_path / "data.pt")
    assert verify_files(dense, converted, inputs=SPEC, data=tmp_path / "data.pt").agree
    dropped = tmp_path / "dropped.pt2"
    report = convert_file(dense, dropped, Recipe(method="drop", experts=4), inputs=SPEC)
    assert report.verified
    assert all(b.relative_error > 1e-3 and not b.exact for b in report.blocks)
    different = verify_files(converted, dropped, inputs=SPEC)
    assert not different.agree
    assert different.outputs[0].cosine < 1
    assert verify_files(converted, dropped, inputs=SPEC, tolerance=10).agree


def test_inspect_before_and_after(dense: Path, converted: Path) -> None:
    before = inspect_file(dense, inputs=SPEC, recipe=Recipe(experts=4))
    assert before.dense is not None
    assert before.report.blocks[0].parameters_after > before.report.blocks[0].parameters_before
    assert any(p.is_meta for p in before.program.graph_module.parameters())  # nothing was computed
    after = inspect_file(converted)
    assert after.dense is None
    assert after.report.verified
    assert [b.path for b in after.report.blocks] == [b.path for b in before.report.blocks]
    assert after.report.parameters_after == before.report.parameters_after


def test_graph_and_module_form_are_the_same_model() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 4, 16)
    fields = {"method": "drop", "experts": 4, "top_k": 2, "seed": 5, "inputs": (x,)}
    graph = moeify.convert(model, form="graph", **fields)
    module = moeify.convert(model, **fields)
    assert module is model
    ours, theirs = graph.state_dict(), module.state_dict()
    new = {name for name in ours if ".experts." in name or ".router." in name}
    assert new
    assert new == {name for name in theirs if ".experts." in name or ".router." in name}
    for name in new:
        assert torch.equal(ours[name], theirs[name]), name
    with torch.no_grad():
        torch.testing.assert_close(graph(x), module(x))


def test_a_converted_archive_is_not_converted_again(converted: Path) -> None:
    with pytest.raises(UnreadableFile) as error:
        convert_file(converted, None, Recipe())
    assert error.value.what == f"{converted} is a .pt2 that moeify has already converted"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "inputs": [{"name": 1}]}'])
def test_a_damaged_moeify_json(converted: Path, tmp_path: Path, text: str) -> None:
    damaged = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(converted) as old, zipfile.ZipFile(damaged, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, text if entry.filename.endswith("moeify.json") else old.read(entry))
    with pytest.raises(UnreadableFile) as error:
        moeify.load(damaged)
    assert error.value.what.startswith(f"the moeify.json in {damaged} is damaged: ")


def test_verify_of_models_that_read_other_inputs(dense: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), other)
    with pytest.raises(BadInputSpec) as error:
        verify_files(dense, other)
    assert error.value.what == (
        f"the input of {dense}, given to {other}: input has shape (2, 16, 16), the model reads input=float32[batch, 8]"
    )


def test_equal_infinities_are_no_difference() -> None:
    masked = torch.tensor([[1.0, float("-inf")], [2.0, 3.0]])
    [error] = compare([masked], [masked.clone()], 1e-5).outputs
    assert (error.max_abs, error.max_relative, error.cosine) == (0.0, 0.0, 1.0)


def test_print_after_and_dump_dir(dense: Path, tmp_path: Path) -> None:
    shown = []
    convert_file(
        dense, None, Recipe(experts=2), inputs=SPEC, print_after=["find-ffn"], dump_dir=tmp_path / "dumps",
        show=lambda title, text: shown.append((title, text)),
    )  # fmt: skip
    assert [title for title, _ in shown] == ["after find-ffn"]
    assert shown[0][1].count("moe.ffn") == 2
    names = [p.name for p in sorted((tmp_path / "dumps").iterdir())]
    assert names == [
        "01-canonicalize.txt", "02-find-ffn.txt", "03-select.txt", "04-make-experts.txt", "05-route.txt",
        "06-clean-up.txt",
    ]  # fmt: skip
    with pytest.raises(UnknownName) as error:
        convert_file(dense, None, Recipe(), inputs=SPEC, print_after=["find"])
    assert error.value.what == "there is no pass named 'find'"
