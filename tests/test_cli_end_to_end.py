"""The commands on a real model: convert, inspect, verify, and what they say when it cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn

from moeify.cli.main import main

SPEC = ["--input", "float32[batch=2,seq=4,16]"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    path = tmp_path_factory.mktemp("cli") / "dense.pt"
    torch.save(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), path)
    return path


@pytest.fixture(scope="module")
def converted(dense: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dense.parent)
        assert main(["convert", str(dense), "--experts", "4", *SPEC]) == 0
    return dense.with_name("dense.moe.pt2")  # where -o is not given


def test_convert_prints_the_proof(dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "o.pt2"
    arguments = ["--experts", "4", "--blocks", "last:1", "--print-after", "select", "--dump-dir", str(tmp_path / "d")]
    assert main(["convert", str(dense), "-o", str(output), *arguments, *SPEC]) == 0
    out = capsys.readouterr().out
    assert "# after select\n" in out
    assert f"{dense}: 1 of 2 feed-forward blocks converted in" in out
    assert "left dense\n  layers.0\n" in out
    assert "verified     every block within 1e-05 (largest " in out
    assert out.endswith(f"wrote        {output}\n")
    assert len(list((tmp_path / "d").iterdir())) >= 6


def test_convert_json(dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "o.pt2"
    assert main(["convert", str(dense), "-o", str(output), "--json", *SPEC]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["output"] == str(output)
    assert data["verified"] is True
    assert 0 < data["max_relative_error"] < 1e-5
    assert [(b["path"], b["converted"], b["reason"], b["activation"]) for b in data["blocks"]] == [
        (f"layers.{i}", True, None, "gelu") for i in range(2)
    ]
    assert all(b["relative_error"] < 1e-5 for b in data["blocks"])


def test_inspect_dense_and_converted_share_the_schema(dense: Path, converted: Path, capsys) -> None:
    reports = []
    for path in (dense, converted):
        assert main(["inspect", str(path), "--json", "--experts", "4"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert set(reports[0]) == set(reports[1])
    assert [b["parameters_after"] for b in reports[0]["blocks"]] == [
        b["parameters_after"] for b in reports[1]["blocks"]
    ]
    assert reports[1]["verified"] is True


def test_graph_of_the_converted_model_folds(converted: Path, capsys) -> None:
    assert main(["inspect", str(converted), "--graph"]) == 0
    out = capsys.readouterr().out
    assert out.count("moe.dispatch_ffn(") == 1
    assert "layers.0-1  x2" in out


def test_diff_shows_the_block_once(dense: Path, capsys) -> None:
    assert main(["inspect", str(dense), "--diff", *SPEC]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "layers.0-1  x2"
    assert len([line for line in lines if line.startswith("  - ") and "moe.ffn(" in line]) == 1
    assert len([line for line in lines if line.startswith("  + ") and "moe.dispatch_ffn(" in line]) == 1


def test_graphs_of_the_converted_model(converted: Path, tmp_path: Path) -> None:
    dot, graphml = tmp_path / "g.dot", tmp_path / "g.graphml"
    assert main(["inspect", str(converted), "--dot", str(dot), "--graphml", str(graphml)]) == 0
    assert "x2" in dot.read_text()
    operators = [op for _, op in nx.read_graphml(graphml).nodes(data="op")]
    assert operators.count("moe.dispatch_ffn") == 2


def test_verify(dense: Path, converted: Path, capsys) -> None:
    assert main(["verify", str(dense), str(converted)]) == 0
    assert "agree: largest relative error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["--method", "cpoy"], 2, "UnknownName"),
        (["--print-after", "find-fnf"], 2, "UnknownName"),
        (["--top-k", "9"], 2, "BadRecipe"),
        (["--input", "what is this"], 2, "BadInputSpec"),
        (["-o", "no/such/folder/o.pt2"], 1, "OutputNotWritten"),
    ],
)
def test_errors_leave_by_their_code(
    dense: Path, tmp_path: Path, capsys, monkeypatch, arguments: list[str], code: int, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(dense), "--json", *arguments]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["kind"] == kind
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there(tmp_path: Path, capsys) -> None:
    assert main(["inspect", str(tmp_path / "no.pt")]) == 3
    assert capsys.readouterr().err.startswith("error: ")
