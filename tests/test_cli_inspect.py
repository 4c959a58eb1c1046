"""``moeify inspect`` and ``moeify verify`` against an api made by hand: what they print and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeify.api import Comparison, OutputError
from moeify.cli.main import main
from tests.cli_api import Api, fake_api

fake = pytest.fixture(fake_api)


def test_inspect_screens(fake: Api, capsys, golden) -> None:
    sections = []
    for flags in ([], ["--blocks"], ["--near-misses"], ["--graph"], ["--diff"]):
        assert main(["inspect", "dense.pt", *flags]) == 0
        command = " ".join(["$ moeify inspect dense.pt", *flags])
        sections.append(f"{command}\n{capsys.readouterr().out}")
    golden("cli_inspect", "\n".join(sections))


def test_inspect_of_a_converted_file_tells_what_was_done(fake: Api, capsys) -> None:
    assert main(["inspect", "x.pt2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("x.pt2: 6 of 7 feed-forward blocks converted\n")
    assert "verified     every block within 1e-05 (largest 6.0e-08)" in out


def test_diff_of_a_converted_file_needs_the_dense_one(fake: Api, capsys) -> None:
    assert main(["inspect", "x.pt2", "--diff"]) == 2
    assert capsys.readouterr().err == (
        "error: x.pt2 is converted already and does not hold what it was before\n"
        "  hint: name the dense model: moeify inspect x.pt2 --diff --against DENSE.pt\n"
    )
    assert main(["inspect", "x.pt2", "--against", "dense.pt"]) == 0
    assert capsys.readouterr().out.startswith("layers.1\n")


def test_inspect_writes_graphs(fake: Api, capsys, tmp_path: Path) -> None:
    dot, graphml = tmp_path / "g.dot", tmp_path / "g.graphml"
    assert main(["inspect", "dense.pt", "--dot", str(dot), "--graphml", str(graphml)]) == 0
    assert dot.read_text().startswith("digraph program {")
    assert "<graphml" in graphml.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.dot", "g.graphml"]
    assert capsys.readouterr().out.endswith(f"wrote {dot}\nwrote {graphml}\n")


def test_a_graph_that_cannot_be_written(fake: Api, capsys, tmp_path: Path) -> None:
    path = tmp_path / "no" / "g.dot"
    assert main(["inspect", "dense.pt", "--dot", str(path)]) == 1
    assert capsys.readouterr().err == f"error: cannot write {path}: no such file or directory\n"


def test_inspect_json_shares_the_schema_and_adds_the_graph(fake: Api, capsys) -> None:
    assert main(["inspect", "dense.pt", "--json", "--graph"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data.pop("graph").startswith("# x=float32[batch, seq, 3]\n")
    assert data == json.loads(json.dumps(fake.report.to_dict()))


def test_verify_screen(fake: Api, capsys) -> None:
    assert main(["verify", "a.pt", "b.pt2", "--tolerance", "0.001"]) == 0
    assert fake.calls[0][1]["tolerance"] == 0.001
    assert capsys.readouterr().out == (
        "  output    largest difference  relative  cosine\n"
        "  output 0  1.0e-06             2.0e-07   1.0000000\n"
        "\n"
        "a.pt and b.pt2 agree: largest relative error 2.0e-07\n"
    )


def test_verify_says_no(fake: Api, capsys) -> None:
    fake.comparison = Comparison([OutputError("output 0", 0.1, 0.2, 0.5)], 0.2, False)
    assert main(["verify", "a.pt", "b.pt2"]) == 1
    assert capsys.readouterr().out.endswith("a.pt and b.pt2 do not agree: largest relative error 2.0e-01\n")
    assert main(["verify", "a.pt", "b.pt2", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["agree"] is False
