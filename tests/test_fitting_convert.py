"""A tiny Llama split and fitted by ``moeify.convert`` and ``moeify convert``, on the bytes of a text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

import moeify
from moeify.cli.main import main
from tests import small_llama

WORDS = "it is a truth universally acknowledged that a single man in possession of a good fortune must want a wife. "
SPLIT = {"method": "carve", "experts": 6, "top_k": 1, "shared": 2}
FLAGS = ["--method", "carve", "--experts", "6", "--top-k", "1", "--shared", "2"]
TEXT = ["--tokenizer", "bytes", "--sequence", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit")
    small_llama.saved(path / "dense", max_position_embeddings=32, bos_token_id=None, eos_token_id=None)
    (path / "book.txt").write_text(WORDS * 12)
    return path


def converted(folder: Path, form: str, **recipe):
    dense = transformers.LlamaForCausalLM.from_pretrained(folder / "dense").eval()
    made = moeify.convert(
        dense, data=folder / "book.txt", tokenizer="bytes", sequence=16, form=form, **{**SPLIT, **recipe}
    )
    return made, made.moeify_report


def test_from_python(folder: Path) -> None:
    graph, report = converted(folder, "graph")
    for block in report.blocks:
        assert block.fitted_rows > 5 * block.held_out_rows > 0
        assert block.repaired
        assert block.repaired_rms_error < block.rms_error
        assert block.all_on_error <= 1e-5  # measured before the fit
        assert 1 / 6 < block.router_agreement <= 1
        assert 0 < block.load_entropy <= 1
    module, _ = converted(folder, "module")
    state = module.state_dict()
    fitted = {
        n: v for n, v in graph.state_dict().items() if any(f".{p}" in n for p in ("experts.", "router.", "shared"))
    }
    assert len(fitted) == 2 * (4 + 2 + 3)
    for name, value in fitted.items():
        assert torch.equal(value, state[name]), name


def test_better_than_without(folder: Path) -> None:
    errors = []
    for recipe in ({}, {"repair": False}, {"repair": False, "router": "topk{init=centroid}"}):
        _, report = converted(folder, "graph", **recipe)
        errors.append([b.repaired_rms_error if b.repaired else b.rms_error for b in report.blocks])
    first = [blocks[0] for blocks in errors]  # of the first block: the inputs of later ones differ
    assert first == sorted(first)
    assert len(set(first)) == 3


def test_from_the_command_line(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    output = tmp_path / "o.pt2"
    words = ["convert", f"{folder}/dense", "-o", str(output), *FLAGS, "--data", f"{folder}/book.txt", *TEXT]
    assert main([*words, "--set", "*.1.mlp:repair=false", "--fit-tokens", "512"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"hidden units profiled on \S+, 80 pieces of 16 tokens: 512 tokens", out)
    assert "fitted on " in out
    assert " others: rms error 0." in out
    assert " routed, 0." in out
    assert "of the choices are the best" in out
    assert "measured every block changed by design" in out
    assert main(["inspect", str(output), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["blocks"]
    assert first["repaired"]
    assert first["repaired_rms_error"] < first["rms_error"]
    assert (second["repaired"], second["repaired_rms_error"]) == (False, None)
    assert second["rms_error"] > 0


def test_few_rows_are_said(folder: Path) -> None:
    dense = transformers.LlamaForCausalLM.from_pretrained(folder / "dense").eval()
    ids = torch.randint(128, (3, 14), generator=torch.Generator().manual_seed(0))
    profile = moeify.profile(dense, data=[(ids, torch.ones_like(ids))])
    made = moeify.convert(dense, profile=profile, form="graph", **SPLIT)
    assert made.moeify_report.model_error_on_fitted_data
    for block in made.moeify_report.blocks:
        assert "repaired on 37 rows for 39 weights of each output: more data would tell more" in block.notes


def test_other_data_are_not_what_was_fitted_to(folder: Path) -> None:
    dense = transformers.LlamaForCausalLM.from_pretrained(folder / "dense").eval()
    ids = torch.randint(128, (3, 14), generator=torch.Generator().manual_seed(0))
    profile = moeify.profile(dense, data=[(ids, torch.ones_like(ids))])
    other = {"input_ids": ids.flip(1), "attention_mask": torch.ones_like(ids)}
    made = moeify.convert(dense, data=other, profile=profile, form="graph", **SPLIT)
    assert not made.moeify_report.model_error_on_fitted_data


def test_a_fit_without_data_is_refused_at_once(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["convert", f"{folder}/dense", "-o", f"{tmp_path}/o.pt2", "--experts", "4", "--method", "split-random"]
    assert main([*words, "--router", "topk{init=classify}"]) == 1
    err = capsys.readouterr().err
    assert "topk{init=classify} is fitted on data, and there are none" in err
    assert "--data" in err
    assert list(tmp_path.iterdir()) == []
