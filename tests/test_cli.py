"""The command line against an api made by hand: what it passes on, what it draws, how errors leave it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeify import api
from moeify.api import Comparison, Inspection, OutputError
from moeify.cli.convert import default_output
from moeify.cli.flags import override
from moeify.cli.main import main
from moeify.data.examples import Options
from moeify.errors import (
    BadOption,
    BadRecipe,
    MoeifyError,
    NotDivisible,
    OutputNotWritten,
    UnreadableFile,
    VerificationFailed,
)
from moeify.ir.recipe import Recipe
from moeify.ir.report import BlockReport, Report
from tests.view_programs import stack


def block(path: str, **changes: Any) -> BlockReport:
    figures: dict[str, Any] = {
        "path": path, "converted": True, "reason": None, "activation": "gelu", "gated": False, "d_model": 384,
        "d_ff": 1536, "anchor": path, "method": "copy", "router": "softmax-topk", "experts": 8, "top_k": 2,
        "d_expert": 1536, "parameters_before": 1_181_568, "parameters_after": 9_455_616,
        "flops_per_token_before": 2_359_296, "flops_per_token_after": 4_724_736, "relative_error": 1e-7, "exact": True,
    }  # fmt: skip
    return BlockReport(**{**figures, **changes})


def report(**changes: Any) -> Report:
    blocks = [block(f"encoder.layer.{i}", relative_error=(i + 1) * 1e-8) for i in range(6)]
    blocks.append(block("classifier", converted=False, reason="one row per sample; --include sample converts it"))
    fields: dict[str, Any] = {
        "model": "dense.pt",
        "output": "dense.moe.pt2",
        "blocks": blocks,
        "near_misses": [
            {"path": f"encoder.layer.{i}.attention", "reason": "an attention projection", "source": None}
            for i in range(6)
        ],
        "inputs": ["input_ids=int64[batch, seq]"],
        "verified": True,
        "max_relative_error": 3.4e-7,
        "model_relative_error": 3.4e-7,
        "parameters_before": 22_713_216,
        "parameters_after": 72_357_504,
        "seconds": 3.21,
        "recipe": Recipe().to_dict(),
        "passes": [{"text": "find-ffn", "seconds": 0.25, "lines": []}],
    }
    return Report(**{**fields, **changes})


class Api:
    """Stands in for moeify.api; remembers how it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        self.error: BaseException | None = None
        self.report = report()
        self.comparison = Comparison([OutputError("output 0", 1e-6, 2e-7, 1.0)], 2e-7, True)
        for name in ("convert_file", "inspect_file", "verify_files"):
            monkeypatch.setattr(api, name, getattr(self, name))

    def convert_file(self, *args: Any, **kwargs: Any) -> Report:
        self._called(args, kwargs)
        kwargs["progress"].stage("computing expert weights", total=2)
        kwargs["progress"].advance()
        if kwargs["print_after_all"]:
            print("a library talks on stdout")
            kwargs["show"]("after select", "# after select\n")
        return self.report

    def inspect_file(self, *args: Any, **kwargs: Any) -> Inspection:
        self._called(args, kwargs)
        dense = None if args[0].endswith(".pt2") else stack(3)
        return Inspection(self.report, stack(3, odd=1), dense)

    def verify_files(self, *args: Any, **kwargs: Any) -> Comparison:
        self._called(args, kwargs)
        return self.comparison

    def _called(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setenv("COLUMNS", "80")
    return Api(monkeypatch)


# --- convert ------------------------------------------------------------------------------------------------------


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


# --- inspect ------------------------------------------------------------------------------------------------------


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


# --- verify -------------------------------------------------------------------------------------------------------


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


# --- listings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [("passes", "find-ffn"), ("methods", "copy"), ("routers", "softmax-topk"), ("backends", "pt2")],
)
def test_listings(capsys, kind: str, name: str) -> None:
    assert main([kind]) == 0
    assert any(line.startswith(f"{name} ") for line in capsys.readouterr().out.splitlines())
    assert main([kind, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)[kind]
    assert name in [entry["name"] for entry in entries]
    assert set(entries[0]) == {"name", "options", "summary"}


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotDivisible("it does not divide", where="a.b", hint="do this"), 1),
        (VerificationFailed("it is not the same"), 1),
        (OutputNotWritten("the disk is full"), 1),
        (BadRecipe("no"), 2),
        (UnreadableFile("empty"), 3),
    ],
)
def test_errors_of_the_api(fake: Api, capsys, error: MoeifyError, code: int) -> None:
    fake.error = error
    assert main(["convert", "dense.pt"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n")
    assert main(["convert", "dense.pt", "--json"]) == code
    out, err = capsys.readouterr()
    kind = type(error).__name__
    assert json.loads(out) == {"error": {"kind": kind, "what": error.what, "where": error.where, "hint": error.hint}}
    assert err == ""


def test_an_interrupt_is_quiet(fake: Api, capsys) -> None:
    fake.error = KeyboardInterrupt()
    assert main(["convert", "dense.pt"]) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"
    assert main(["convert", "dense.pt", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Interrupted"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")]
)
def test_no_memory_is_an_error_of_its_own(fake: Api, capsys, error: Exception) -> None:
    fake.error = error
    assert main(["convert", "dense.pt"]) == 1
    assert capsys.readouterr().err == "error: there is not enough memory for this\n"


def test_a_bug_has_a_traceback_only_with_debug(fake: Api, capsys) -> None:
    fake.error = ZeroDivisionError("boom")
    assert main(["convert", "dense.pt"]) == 70
    assert capsys.readouterr().err == (
        "error: this is a bug in moeify: ZeroDivisionError: boom\n"
        "  hint: run it again with --debug to see where, and please report it\n"
    )
    assert main(["convert", "dense.pt", "--debug"]) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_usage_errors(fake: Api, capsys) -> None:
    assert main(["convrt"]) == 2
    assert capsys.readouterr().err == ("error: there is no command named 'convrt'\n  hint: did you mean 'convert'?\n")
    assert main(["convert", "dense.pt", "--expert", "3"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no such option: --expert")
    assert "--experts" in err
    assert err.endswith("\n  hint: see moeify convert --help\n")
    assert main(["convert", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "UsageError"
    assert main(["convert", "dense.pt", "--top-k", "9"]) == 2
    assert capsys.readouterr().err == (
        "error: top-k 9 is larger than the number of experts, 8\n  hint: choose --top-k between 1 and 8\n"
    )
    assert fake.calls == []


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


def test_no_arguments_print_the_help(capsys) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: moeify ")


def test_a_full_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moeify", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: cannot print: no space left on device\n")


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "moeify", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
