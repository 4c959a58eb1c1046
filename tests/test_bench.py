"""``moeify bench``: what it runs on which inputs, its ratios, its table, its plot. No times are asserted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moeify.api import bench, work
from moeify.api.batches import batch
from moeify.api.dense_twin import dense_twin
from moeify.api.load import read_graph
from moeify.cli.main import main
from moeify.ir.program import Program
from moeify.ir.report import BlockReport, Report

D, D_FF, EXPERTS, TOP_K, LAYERS = 16, 32, 4, 2, 2
PEAKS = work.Peaks(flops=1e9, bandwidth=1e9)


def saved(folder: Path, *flags: str) -> Path:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, D_FF, dropout=0.0, batch_first=True, activation="gelu")
    torch.save(nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval(), folder / "dense.pt")
    output = folder / "moe.pt2"
    shape = ["--input", "float32[batch=2,seq=4,16]"]
    assert (
        main(["convert", str(folder / "dense.pt"), "--experts", str(EXPERTS), "-o", str(output), *shape, *flags]) == 0
    )
    return output


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def converted(file: Path) -> tuple[Program, dict[str, BlockReport]]:
    return opened(file)


def opened(file: Path) -> tuple[Program, dict[str, BlockReport]]:
    program, facts = read_graph(file)
    return program, {block.anchor: block for block in Report.from_dict(facts["report"]).blocks}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeify.backends.onnxruntime import measure

    monkeypatch.setattr(measure, "_SETTLE", 0.0)
    monkeypatch.setattr(measure, "peak_flops", lambda: PEAKS.flops)
    monkeypatch.setattr(measure, "peak_bandwidth", lambda: PEAKS.bandwidth)


@pytest.fixture
def without_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed; compiling takes seconds."""
    from moeify.backends.tvm import packages

    def none(name: str) -> str:
        raise packages.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.importlib.metadata, "version", none)


# --- the dense twin -----------------------------------------------------------------------------------------------


def test_the_twin_is_the_model_with_dense_blocks(converted: tuple[Program, dict[str, BlockReport]]) -> None:
    program, blocks = converted
    before = program.run(*program.example)
    twin = dense_twin(program, blocks)
    assert not any("moeify" in str(n.target) and "ffn.default" not in str(n.target) for n in twin.graph.nodes)
    shapes = {name: tuple(p.shape) for name, p in twin.graph_module.named_parameters() if ".dense." in name}
    assert len(shapes) == 4 * LAYERS
    anchor = next(iter(blocks))
    assert shapes[f"{anchor}.dense.up"] == (D_FF, D)
    assert shapes[f"{anchor}.dense.down"] == (D, D_FF)
    assert not any(".experts." in name or ".router." in name for name, _ in twin.graph_module.named_parameters())
    assert twin.run(*twin.example).shape == before.shape
    torch.testing.assert_close(program.run(*program.example), before, rtol=0, atol=0)  # it is left alone


def test_the_twin_has_the_weights_that_were_asked_for(converted: tuple[Program, dict[str, BlockReport]]) -> None:
    """With the dense model's own weights put back, the twin is the dense model: copies keep the function."""
    program, blocks = converted
    twin = dense_twin(program, blocks)
    for anchor in blocks:
        for role in ("up", "down", "up_bias", "down_bias"):
            own = program.parameter(f"{anchor}.experts.{role}")[0]
            twin.parameter(f"{anchor}.dense.{role}").data.copy_(own)
    torch.testing.assert_close(twin.run(*twin.example), program.run(*program.example), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [[], ["--shared-gate"]], ids=["plain", "gated"])
def test_shared_experts_are_not_in_the_twin(tmp_path: Path, gate: list[str]) -> None:
    program, blocks = opened(saved(tmp_path, "--shared", "1", *gate))
    twin = dense_twin(program, blocks)
    names = {name for name, _ in twin.graph_module.named_parameters()}
    assert sum(".dense." in name for name in names) == 4 * LAYERS
    assert not any(".shared" in name for name in names)
    rows, rest = work.observe(program, program.example)
    sparse = work.sparse_ffns(program)
    dense = work.dense_ffns(sparse, program, {anchor: block.d_ff for anchor, block in blocks.items()})
    slim = work.rest_of_twin(twin, dense, rows, program.example)
    router, shared = 2 * D * EXPERTS + (2 * D if gate else 0), 2 * 2 * D * D_FF
    assert rest.flops - slim.flops == pytest.approx(sum(rows) * (router + shared))


# --- work ---------------------------------------------------------------------------------------------------------


def test_work_of_a_program(converted: tuple[Program, dict[str, BlockReport]]) -> None:
    program, _ = converted
    assert work.sparse_ffns(program) == [work.FfnWork(EXPERTS, TOP_K, 2 * D * D_FF, 4)] * LAYERS
    rows, rest = work.observe(program, program.example)
    tokens, seq = 8, 4
    assert rows == [tokens] * LAYERS
    attention = 2 * tokens * (4 * D * D) + 2 * 2 * tokens * seq * D
    assert rest.flops == LAYERS * (attention + 2 * tokens * D * EXPERTS)
    outside = [p for name, p in program.graph_module.named_parameters() if ".experts." not in name]
    assert rest.bytes == 4 * sum(p.numel() for p in outside)


def test_the_floor_is_a_roofline_of_each_block_and_one_of_the_rest() -> None:
    ffn = work.FfnWork(experts=4, top_k=2, weights=1000, item=4)
    assert ffn.seconds(1, PEAKS) == pytest.approx(2 * 1000 * 4 / 1e9)  # bytes of two experts
    assert ffn.seconds(100, PEAKS) == pytest.approx(2 * 1000 * 100 * 2 / 1e9)  # FLOPs
    rest = work.Rest(flops=7e3, bytes=5e3)
    assert work.floor([ffn, ffn], [1, 100], rest, PEAKS) == pytest.approx(8e-6 + 4e-4 + 7e-6)


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "sizes"), [(1, (1, 1)), (16, (1, 16)), (128, (1, 128)), (512, (4, 128))])
def test_tokens_become_batch_and_sequence(
    converted: tuple[Program, dict[str, BlockReport]], tokens: int, sizes: tuple[int, int]
) -> None:
    made = batch(converted[0], tokens, rows=8)
    assert tuple(made.sizes.values()) == sizes
    assert [tuple(t.shape) for t in made.inputs] == [(*sizes, D)]


def test_fixed_sizes_stay(tmp_path: Path) -> None:
    from tests.programs import plain

    program = plain()
    spec = program.inputs[0]
    for shape, tokens, wanted in (
        ((spec.shape[0], 5), 20, (4, 5)),  # the sequence is fixed
        ((2, spec.shape[1]), 20, (2, 10)),  # the batch is
        ((2, 5), 20, (2, 5)),  # both are
    ):
        program.inputs = (type(spec)(spec.name, spec.dtype, shape),)
        (made,) = batch(program, tokens, rows=10).inputs
        assert made.shape == wanted
        assert set(made.unique().tolist()) <= set(program.example[0].unique().tolist())


def test_masks_keep_their_pattern() -> None:
    from tests.programs import plain

    program = plain()
    program.example = (torch.tensor([[1, 1, 0]]),)
    (made,) = batch(program, 12, rows=3).inputs
    assert made.tolist() == [[1, 1, 0] * 4]


# --- ratios -------------------------------------------------------------------------------------------------------


def test_ratios() -> None:
    taken = {
        ("torch", "dense"): [2.0, 4.0, 8.0],
        ("torch", "dispatch_ffn"): [1.0, 4.0, 2.0],
        ("onnxruntime", "split"): [3.0, 1.0, 2.0],
    }
    rows = bench.rows_of("m", taken, 16, 2, (0.5, 0.8))
    assert [(r.runtime, r.lowering, r.median_ms, r.ratio_to_dense, r.ratio_to_floor) for r in rows] == [
        ("torch", "dense", 4000.0, 1.0, pytest.approx(5.0)),
        ("torch", "dispatch_ffn", 2000.0, 0.5, 4.0),
        ("onnxruntime", "split", 2000.0, None, 4.0),
    ]
    assert {(r.model, r.tokens, r.threads) for r in rows} == {("m", 16, 2)}


# --- the command --------------------------------------------------------------------------------------------------


def test_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(file), "--tokens", "1,16", "--threads", "1", "--rounds", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data["rows"][0]) == {
        "model", "runtime", "lowering", "tokens", "threads", "median_ms", "ratio_to_dense", "ratio_to_floor",
    }  # fmt: skip
    kinds = [
        ("torch", "dense"), ("torch", "dispatch_ffn"), ("onnxruntime", "dense"), ("onnxruntime", "split"),
        ("onnxruntime", "com.microsoft.MoE"), ("tvm", "dense"), ("tvm", "fused"),
    ]  # fmt: skip
    assert [(r["tokens"], r["runtime"], r["lowering"]) for r in data["rows"]] == [
        (n, *k) for n in (1, 16) for k in kinds
    ]
    assert all(r["model"] == "moe.pt2" and r["threads"] == 1 for r in data["rows"])
    assert all(r["median_ms"] > 0 and r["ratio_to_dense"] > 0 and r["ratio_to_floor"] > 0 for r in data["rows"])
    assert (data["peak_flops"], data["peak_bandwidth"], data["threads"], data["plot"]) == (1e9, 1e9, 1, None)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_table_and_plot(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_tvm: None, suffix: str
) -> None:
    plot = tmp_path / f"p.{suffix}"
    assert main(["bench", str(file), "--tokens", "4", "--threads", "1", "--rounds", "1", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("moe.pt2\n  tokens  runtime")
    assert "  4       onnxruntime  split" in out
    assert out.endswith(f"wrote        {plot}\n")
    assert plot.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])
    assert list(tmp_path.iterdir()) == [plot]


def test_a_plot_needs_matplotlib_before_anything_is_measured(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", str(file), "--plot", str(tmp_path / "p.png")]) == 1
    assert capsys.readouterr().err == (
        "error: --plot needs matplotlib, which is not installed\n  hint: pip install matplotlib\n"
    )


def test_without_onnx_runtime(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", str(file)]) == 1
    assert capsys.readouterr().err == (
        "error: moeify bench needs the package onnx, which is not installed\n"
        "  hint: pip install 'moeify[onnxruntime]'\n"
    )


def test_without_tvm_the_rest_is_timed_and_a_note_says_so(
    file: Path, capsys: pytest.CaptureFixture[str], without_tvm: None
) -> None:
    assert main(["bench", str(file), "--tokens", "4", "--threads", "1", "--rounds", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {row["runtime"] for row in data["rows"]} == {"torch", "onnxruntime"}
    why = "the tvm backend needs the package apache-tvm, which is not installed"
    kernels, tvm = data["notes"]
    assert kernels.startswith(f"{file}: no kernel lowering: the native kernels are not built")
    assert tvm == f"{file}: not compiled by TVM: {why}"


def test_with_the_library_the_kernel_is_timed_and_a_note_says_what_ran(
    file: Path, capsys: pytest.CaptureFixture[str], without_tvm: None, kernel_library: Path
) -> None:
    assert main(["bench", str(file), "--tokens", "4", "--threads", "1", "--rounds", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert "kernel" in {row["lowering"] for row in data["rows"]}
    assert data["notes"][0].startswith(f"{file}: kernel ran as the fused kernel")


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--tokens", "1,x"], 2, "cannot read --tokens '1,x'\n  hint: write --tokens 1,16,128,512"),
        (["--tokens", "0"], 2, "cannot read --tokens '0'\n  hint: write --tokens 1,16,128,512"),
        (["--plot", "p.pdf"], 2, "cannot draw p.pdf: it does not end in .png or .svg\n  hint: write p.png"),
        (["--plot", "/nowhere/p.png"], 1, "cannot write /nowhere/p.png: the folder /nowhere does not exist"),
    ],
)
def test_bad_options(file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, text: str) -> None:
    assert main(["bench", str(file), *flags]) == code
    assert capsys.readouterr().err == f"error: {text}\n"


def test_a_dense_file_is_an_error(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(file.with_name("dense.pt")), "--tokens", "1"]) == 3
    assert "error: " in capsys.readouterr().err
