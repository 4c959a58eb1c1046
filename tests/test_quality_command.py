"""``moeify quality`` and the files it reads: what it prints, demands and refuses."""

from __future__ import annotations

import copy
import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import moeify
from moeify.api import QualityReport
from moeify.cli.main import main
from tests import quality_models
from tests.quality_models import BATCH, FLAGS, INPUTS, MODULE, Classifier, Layer, Unmasked, drawn

MOE = ["--method", "split-random", "--experts", "3", "--shared", "1", "--top-k", "1"]

models = pytest.fixture(scope="module")(quality_models.models)
report = pytest.fixture(scope="module")(quality_models.report)


@pytest.fixture(scope="module")
def files(models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality")
    torch.save(models[0], path / "dense.pt")
    torch.save(Classifier("logits"), path / "other.pt")
    torch.save(drawn(), path / "data.pt")
    torch.save({**drawn(), "attention_mask": drawn()["attention_mask"] * 0}, path / "padding.pt")
    torch.save({"input_ids": drawn()["input_ids"]}, path / "half.pt")
    (path / "book.txt").write_text("\x01\x02\x03\x04\x05\x06\x07\x08\t\n" * 40)
    allow = ["--allow", MODULE]
    assert main(["convert", f"{path}/dense.pt", *MOE, *FLAGS, *allow, "-o", f"{path}/moe.pt2"]) == 0
    gc.collect()
    return path


def test_a_module_and_its_files_give_the_same(models, report: QualityReport, files: Path) -> None:
    paths = (files / "dense.pt", files / "moe.pt2", files / "data.pt")
    found = moeify.quality(*paths, inputs=INPUTS, batch=BATCH, classes=True, allow=[MODULE])
    for one, other in zip([*found.blocks, *found.outputs], [*report.blocks, *report.outputs], strict=True):
        for name, value in vars(one).items():
            expected = getattr(other, name)
            if isinstance(value, (float, list)):
                expected = pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert value == expected, name


def test_the_dense_model_is_gone_when_the_other_is_read(files: Path, monkeypatch) -> None:
    module = sys.modules["moeify.api.quality"]  # as an attribute of the package it is the function
    captured, read_graph, seen = module.captured, module.read_graph, []

    def capturing(*args):
        program, notes = captured(*args)
        seen.append(weakref.ref(program.graph_module.get_parameter("embed.weight")))
        return program, notes

    def reading(path):
        assert seen[0]() is None
        return read_graph(path)

    monkeypatch.setattr(module, "captured", capturing)
    monkeypatch.setattr(module, "read_graph", reading)
    moeify.quality(files / "dense.pt", files / "moe.pt2", files / "data.pt", inputs=INPUTS, allow=[MODULE])
    assert seen


def words(files: Path, data: str = "data.pt") -> list[str]:
    return [
        "quality",
        f"{files}/dense.pt",
        f"{files}/moe.pt2",
        "--data",
        f"{files}/{data}",
        *FLAGS,
        "--allow",
        MODULE,
    ]


def test_what_it_prints(files: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*words(files), "--classes"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{files}/moe.pt2 against {files}/dense.pt, in ")
    assert "  block         rows  rms error  cosine  experts  entropy  cv " in out
    assert "  layers.0.mlp  " in out
    assert "  output  of           predictions  agreement  KL, nats  cosine  rms error  largest error\n" in out
    assert "  logits  next tokens  " in out
    assert "  states  embeddings                " in out
    assert "\nperplexity   " in out
    assert f"\ndata         {files}/data.pt, 10 examples; 2 batches were run\n" in out


def test_json(files: Path, report: QualityReport, capsys) -> None:
    assert main([*words(files), "--classes", "--json", "--batch", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["blocks"][0]["rms_error"] == pytest.approx(report.blocks[0].rms_error, rel=1e-4)
    assert said["outputs"][0]["perplexity_ratio"] == pytest.approx(report.outputs[0].perplexity_ratio, rel=1e-4)
    assert (said["missed"], said["batches"]) == ([], 3)


@pytest.mark.parametrize(
    ("demand", "code"),
    [
        (["--at-least-agreement", "0.01"], 0),
        (["--at-least-agreement", "1"], 1),
        (["--at-most-perplexity-ratio", "100"], 0),
        (["--at-most-perplexity-ratio", "0.1"], 1),
    ],
)
def test_demands(files: Path, capsys, demand: list[str], code: int) -> None:
    assert main([*words(files), "--json", *demand]) == code
    assert len(json.loads(capsys.readouterr().out)["missed"]) == code


def test_data_that_the_conversion_learnt_from_are_named(files: Path, tmp_path: Path, capsys) -> None:
    text = ["--data", f"{files}/book.txt", "--tokenizer", "bytes", "--sequence", "6"]
    split = ["--method", "split-coactivation", "--experts", "4", "--top-k", "4"]
    model = [f"{files}/dense.pt", "--allow", MODULE]
    assert main(["convert", *model, *split, *FLAGS, *text, "-o", f"{tmp_path}/o.pt2"]) == 0
    assert main(["quality", *model, f"{tmp_path}/o.pt2", *FLAGS, *text]) == 0
    assert f"learnt from {files}/book.txt itself" in capsys.readouterr().out.replace("\n             ", " ")
    assert main(["quality", *model, f"{tmp_path}/o.pt2", *FLAGS, "--data", f"{files}/data.pt"]) == 0
    assert "learnt" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "code", "text"),
    [
        (["{f}/dense.pt", "{f}/moe.pt2"], 2, "--data"),
        (["{f}/dense.pt", "{f}/moe.pt2", "--data", "none.pt"], 3, "there is no file"),
        (["{f}/dense.pt", "{f}/dense.pt", "--data", "{f}/data.pt"], 3, "is not a torch.export archive"),
        (["{f}/moe.pt2", "{f}/moe.pt2", "--data", "{f}/data.pt"], 3, "already converted"),
        (["{f}/dense.pt", "{f}/moe.pt2", "--data", "{f}/half.pt"], 2, "no tensor named 'attention_mask'"),
        (["{f}/dense.pt", "{f}/moe.pt2", "--data", "{f}/padding.pt"], 2, "is padding"),
    ],
)
def test_errors(files: Path, capsys, given: list[str], code: int, text: str) -> None:
    command = ["quality", *(word.format(f=files) for word in given), *FLAGS, "--allow", MODULE]
    assert main(command) == code
    assert text in capsys.readouterr().err


def test_models_that_do_not_belong_together(files: Path, models) -> None:
    inputs, batch = ["float32[batch=2,seq=3,8]"], [torch.randn(2, 3, 8)]
    other = Classifier("logits")
    with pytest.raises(moeify.MoeifyError, match="has no mixture of experts"):
        moeify.quality(other, copy.deepcopy(other), batch, inputs=inputs)
    wrong = moeify.convert(nn.Sequential(Layer()), inputs=inputs, experts=2, top_k=1)
    with pytest.raises(moeify.MoeifyError, match="no feed-forward block where"):
        moeify.quality(other, wrong, batch, inputs=inputs)
    unmasked = Unmasked()
    with pytest.raises(moeify.MoeifyError, match=r"given to Model holds 1 tensors and the model reads 2"):
        moeify.quality(unmasked, models[1], [torch.zeros(2, 6, dtype=torch.int64)])


def test_demands_on_a_model_that_predicts_nothing(files: Path, capsys) -> None:
    other = ["quality", f"{files}/other.pt", f"{files}/moe.pt2", "--data", f"{files}/data.pt", "--allow", MODULE]
    other += ["--input", "float32[batch=2,seq=3,8]"]
    assert main([*other, "--at-most-perplexity-ratio", "1"]) == 2
    assert "it has no perplexity" in capsys.readouterr().err
