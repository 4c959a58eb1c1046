"""``moeify convert`` against an api made by hand: what it passes on, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeify.cli.convert import default_output
from moeify.cli.flags import override
from moeify.cli.main import main
from moeify.data.examples import Options
from moeify.errors import BadOption
from moeify.ir.recipe import Recipe
from tests.cli_api import Api, block, fake_api, report

fake = pytest.fixture(fake_api)


@pytest.mark.parametrize("columns", [80, 120])
def test_convert_screen(fake: Api, capsys, golden, monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["convert", "dense.pt", "--time-passes"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    golden(f"cli_convert_{columns}", text)


def test_flags_reach_the_api(fake: Api) -> None:
    arguments = (
        "convert dense.pt -o out.pt2 --method drop{ratio=0.25} --experts 4 --top-k 1 --router switch --shared 1 "
        "--shared-gate --blocks every:2 --include sample --seed 7 --input x=float32[2,3] --data d.txt "
        "--tokenizer bytes --sequence 64 --image-mean 0.4,0.5,0.6 --image-std 0.25 --profile p --factory a.b:c "
        "--allow a.b --allow c.d --print-after route --dump-dir dumps"
    )
    assert main([*arguments.split(), "--set", "*.0:experts=2,method=noise{std=0.1,fraction=0.5}"]) == 0
    (model, output, recipe), options = fake.calls[0]
    assert (model, output) == ("dense.pt", "out.pt2")
    assert recipe == Recipe(
        method="drop{ratio=0.25}", experts=4, top_k=1, router="switch", shared=1, shared_gate=True, blocks="every:2",
        include=("sample",), seed=7, overrides=(("*.0", {"experts": 2, "method": "noise{std=0.1,fraction=0.5}"}),),
    )  # fmt: skip
    del options["progress"], options["show"]
    assert options == {
        "inputs": ["x=float32[2,3]"], "data": "d.txt", "factory": "a.b:c", "allow": ["a.b", "c.d"],
        "options": Options("bytes", 64, (0.4, 0.5, 0.6), (0.25,), seed=7), "profile": "p",
        "print_after": ["route"], "print_after_all": False, "dump_dir": "dumps",
    }  # fmt: skip


def test_flags_win_over_the_recipe_file(fake: Api, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('experts = 16\ntop-k = 4\nseed = 3\n[[override]]\nblocks = "a.*"\nexperts = 32\n')
    assert main(["convert", "dense.pt", "--recipe", str(file), "--experts", "6", "--set", "b:top-k=1"]) == 0
    recipe = fake.calls[0][0][2]
    assert (recipe.experts, recipe.top_k, recipe.seed) == (6, 4, 3)
    assert recipe.overrides == (("a.*", {"experts": 32}), ("b", {"top_k": 1}))


@pytest.mark.parametrize(
    ("model", "name"),
    [("a/b/dense.pt", "dense.moe.pt2"), ("models/SmolLM2-1.7B/", "SmolLM2-1.7B.moe.pt2"), ("x.v2.pt2", "x.v2.moe.pt2")],
)
def test_default_output(model: str, name: str) -> None:
    assert default_output(model) == Path(name)


def test_convert_json_is_one_object(fake: Api, capsys) -> None:
    fake.report = report(max_relative_error=float("nan"))
    assert main(["convert", "dense.pt", "--json", "--print-after-all"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["output"] == "dense.moe.pt2"
    assert data["verified"] is True
    assert data["max_relative_error"] == "nan"
    assert {"path", "converted", "reason", "activation", "relative_error"} <= set(data["blocks"][0])
    assert "a library talks on stdout" in err
    assert "# after select" in err


def test_print_after_goes_to_stdout(fake: Api, capsys) -> None:
    assert main(["convert", "dense.pt", "--print-after-all"]) == 0
    assert "# after select\n" in capsys.readouterr().out


def test_methods_that_change_the_function_are_reported_as_such(fake: Api, capsys) -> None:
    blocks = [block("a.0", exact=False, relative_error=0.31, method="drop"), block("a.1")]
    fake.report = report(blocks=blocks, model_relative_error=0.12)
    assert main(["convert", "dense.pt"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "measured 1 of 2 blocks within 1e-05 (largest 1.0e-07), 1 block changed by design (largest 3.1e-01), "
        "whole model 1.2e-01"
    ) in text


def test_splits_say_what_is_active_and_what_all_experts_on_give(fake: Api, capsys) -> None:
    split = {"exact": False, "method": "carve", "router": "topk", "shared": 2}
    fake.report = report(
        blocks=[
            block("a.0", **split, d_expert=96, active_share=0.25, all_on_error=2e-7, relative_error=0.4),
            block("a.1", **split, d_expert=192, active_share=0.5, all_on_error=3e-7, relative_error=0.3),
            block("a.2", active_share=2.0),
        ],
        model_relative_error=0.1,
    )
    assert main(["convert", "dense.pt"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert " active 25% to 50% of an FFN's hidden units for each token " in text
    assert "whole model 1.0e-01; all experts on: within 1e-05 (largest 3.0e-07) wrote" in text
    fake.report.model_error_on_fitted_data = True
    assert main(["convert", "dense.pt"]) == 0
    assert "whole model 1.0e-01 on data it was fitted to; all" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", "dense.pt", "--blocks"]) == 0
    text = capsys.readouterr().out
    assert text.count("relative error with all experts on") == 2
    assert "relative error with all experts on 2.0e-07\n" in text


def test_whole_experts_have_no_share_to_speak_of(fake: Api, capsys) -> None:
    fake.report = report(blocks=[block("a.0", active_share=2.0)])
    assert main(["convert", "dense.pt"]) == 0
    text = capsys.readouterr().out
    assert "hidden units" not in text
    assert "all experts on" not in text


def test_long_paths_are_never_cut(fake: Api, capsys) -> None:
    long = "model.language_model.decoder.transformer.layers.17.feed_forward.experts_of_the_dense_kind.mlp"
    fake.report = report(blocks=[block(long), block(long + ".x", converted=False, reason="because")])
    assert main(["convert", "dense.pt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  {long}" in lines
    assert f"  {long}.x" in lines


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("a.*:experts=4", {"experts": 4}),
        ("a.*:top-k=1,shared=1,shared-gate", {"top_k": 1, "shared": 1, "shared_gate": True}),
        ("a.*:shared-gate=no", {"shared_gate": False}),
        ("a.*:router=noisy-topk{noise=0.1,x=2},experts=2", {"router": "noisy-topk{noise=0.1,x=2}", "experts": 2}),
    ],
)
def test_set(text: str, fields: dict[str, Any]) -> None:
    assert override(text) == ("a.*", fields)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a.*", "cannot read --set 'a.*'"),
        ("a:width=3", "--set 'a:width=3' names a field that does not exist: 'width'"),
        ("a:experts=x", "--set 'a:experts=x' wants a whole number for experts, not 'x'"),
        ("a:shared-gate=7", "--set 'a:shared-gate=7' wants true or false for shared-gate, not '7'"),
    ],
)
def test_set_that_does_not_parse(text: str, what: str) -> None:
    with pytest.raises(BadOption) as error:
        override(text)
    assert error.value.what == what
