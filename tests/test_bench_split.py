"""The benchmarks of splits: what is fitted to is not what is tested, and a bar is met or missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import split_data, split_files
from bench.split_report import Bar, finish
from bench.split_smollm2 import PARTS, RECIPES


def test_prompts_of_the_two_parts_share_nothing() -> None:
    for templates in (split_data._ATTACKS, split_data._QUESTIONS):
        assert set(templates["fit"]).isdisjoint(templates["test"])
        words = [{" ".join(text.split()[:2]) for text in templates[part]} for part in ("fit", "test")]
        assert words[0].isdisjoint(words[1])


def test_words_that_are_fitted_to_are_in_no_test(monkeypatch) -> None:
    monkeypatch.setattr(split_data, "word_pairs", lambda: {"one": [("Tiger", "cat", 7.0)]})
    monkeypatch.setattr(split_data, "novel", lambda name: "The tiger and the cat had seen a house with many old doors.")
    words = split_data.fit_words(4)
    assert len(words) == 4
    assert [len(text.split()) for text in words] == [1, 1, 2, 2]
    assert {"tiger", "cat"}.isdisjoint(" ".join(words).split())
    held = split_data.held_out_words(2)
    assert [len(text.split()) for text in held] == [1, 2]
    assert set(" ".join(split_data.fit_words(4)).split()).isdisjoint(" ".join(held).split())


def test_recipes_have_the_share_that_they_are_named_after() -> None:
    for (name, share), recipe in RECIPES.items():
        active, parts = map(int, share.split("/"))
        blocks = [recipe.for_block(f"model.layers.{i}.mlp") for i in range(30)]
        split = [f"model.layers.{i}.mlp" in recipe.blocks.split(",") or recipe.blocks == "all" for i in range(30)]
        assert {b.experts + b.shared for b in blocks} == {8 if name == "cmoe" else PARTS} or name == "allocated"
        on = [(b.shared + b.top_k) / (b.shared + b.experts) if taken else 1.0 for b, taken in zip(blocks, split)]
        assert abs(sum(on) / 30 - active / parts) < 0.005


def test_a_bar_that_is_missed_is_said(capsys) -> None:
    rows = [{"model": "a", "ratio": 1.2}, {"model": "b", "other": 3}]
    bars = [Bar("ratio", 1.2, 1.15), Bar("speed", 1.9, 1.8, at_least=True)]
    assert finish("title", rows, bars, seconds=1.0, as_json=False) == 1
    out = capsys.readouterr().out
    assert "ratio: 1.2 (bar: at most 1.15): MISSED" in out
    assert "speed: 1.9 (bar: at least 1.8): met" in out
    assert finish("title", rows, bars[1:], seconds=1.0, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["bars"] == [
        {"what": "speed", "figure": 1.9, "bar": 1.8, "at_least": True, "met": True}
    ]


def test_the_files_that_the_commands_of_the_docs_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where they were begun before; a model that is there is not made again."""

    def fail(folder: Path) -> None:
        (folder / "begun").mkdir(parents=True)
        raise KeyboardInterrupt

    def make(folder: Path) -> None:
        (folder / "config").mkdir(parents=True)

    files = ("nanoguard.pt", "prompt_guard.py", "pretrained.py", "smollm2")
    rows = torch.arange(12).reshape(3, 4)[:, :2]
    monkeypatch.setattr(split_files, "TEXTS", {"fit.txt": lambda: "text"})
    monkeypatch.setattr(split_files, "tokens", lambda part: {"input_ids": rows if part == "fit" else rows + 1})
    monkeypatch.setattr(split_files, "MODELS", {"smollm2": fail})
    with pytest.raises(KeyboardInterrupt):
        split_files.write(tmp_path)
    assert not (tmp_path / "smollm2").exists()
    for made in (make, fail):
        monkeypatch.setattr(split_files, "MODELS", {"smollm2": made})
        names = {path.name for path in split_files.write(tmp_path)}
        assert names == {"fit.txt", "guard-fit.safetensors", "guard-test.safetensors", *files}
    assert [path.name for path in (tmp_path / "smollm2").iterdir()] == ["config"]
    assert load_file(tmp_path / "guard-test.safetensors")["input_ids"].equal(rows + 1)
