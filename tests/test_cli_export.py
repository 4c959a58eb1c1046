"""``moeify export`` against an api made by hand: what it passes on, and what it draws."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moeify.api import export as api_export
from moeify.cli.main import main
from moeify.errors import VerificationFailed
from moeify.ir.export_report import ExportedCall, ExportReport


def report(**changes: Any) -> ExportReport:
    blocks = [
        ExportedCall(f"encoder.layer.{i}", 0, "split", "expected at 128 tokens", 8, 2, relative_error=(i + 1) * 1e-7)
        for i in range(3)
    ]
    blocks.append(ExportedCall("decoder.layer.0", 0, "com.microsoft.MoE", "asked for", 4, 1, relative_error=2e-6))
    fields: dict[str, Any] = {
        "model": "moe.pt2", "backend": "onnxruntime", "target": "cpu", "dtype": "float32", "tokens": 128,
        "output": "moe.onnx", "files": ["moe.onnx", "moe.onnx.data"], "bytes": 289_600_000, "blocks": blocks,
        "provider": "cpu", "verified_on": "ONNX Runtime's cpu provider", "verified": True,
        "max_relative_error": 3e-6, "model_relative_error": 3e-6,
        "tokens_verified": 128, "seconds": 3.21, "warnings": ["at 128 tokens the sparse block is slower"],
    }  # fmt: skip
    return ExportReport(**{**fields, **changes})


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How the api was called; its answer is ``called["report"]``, an error is raised."""
    seen: dict[str, Any] = {"report": report()}

    def export_file(model: str, output: Any, backend: Any, **options: Any) -> ExportReport:
        seen.update(model=model, output=output, backend=backend, **options)
        if isinstance(seen["report"], Exception):
            raise seen["report"]
        return seen["report"]

    monkeypatch.setattr(api_export, "export_file", export_file)
    monkeypatch.setenv("COLUMNS", "120")
    return seen


def test_screen(called: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    assert main(["export", "moe.pt2"]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "moe.pt2: 4 expert blocks lowered to onnxruntime (cpu, float32) in 3.2 s",
        "",
        "  block                  experts  lowering           error    because",
        "  encoder.layer.0-2  x3  8 top-2  split              3.0e-07  expected at 128 tokens",
        "  decoder.layer.0        4 top-1  com.microsoft.MoE  2.0e-06  asked for",
        "",
        "warning      at 128 tokens the sparse block is slower",
        (
            "verified     on ONNX Runtime's cpu provider: every block within 1e-04 of the program (largest 2.0e-06), "
            "whole model"
        ),
        "             3.0e-06",
        "wrote        moe.onnx, moe.onnx.data (289.6 MB)",
    ]


def test_screen_of_what_leaves_cuda_and_of_near_ties(called: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    moved = {"node": "pool", "op": "MaxPool", "provider": "cpu", "why": "no kernel at opset 23", "matters": True}
    wrong = {"node": "moe", "op": "MoE", "provider": "cuda", "why": "a width of 12", "matters": True}
    shape = {"node": "n", "op": "Shape", "provider": "cpu", "why": "shape arithmetic", "matters": False}
    called["report"] = report(target="cuda", placements=[moved, wrong, shape], rerouted=2)
    assert main(["export", "moe.pt2", "--target", "cuda"]) == 0
    out = capsys.readouterr().out
    assert "cuda         pool (MaxPool) will run on the CPU: no kernel at opset 23" in out
    assert "cuda         moe (MoE) will fail or go wrong on CUDA: a width of 12" in out
    assert "shape arithmetic" not in out
    assert "nothing was run on a GPU" in out
    assert "2 of 128 token choices went to other experts at a near-tie of scores" in out


def test_json_is_one_object(called: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    assert main(["export", "moe.pt2", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["output"] == "moe.onnx"
    assert written["max_relative_error"] == 3e-6
    assert {"path", "lowering", "why", "relative_error"} <= set(written["blocks"][0])


def test_the_options_reach_the_backend(called: dict[str, Any]):
    flags = ["--target", "cuda", "--dtype", "float16", "--bits", "8", "--tokens", "7", "--threads", "3", "--measure"]
    flags += ["--lowering", "split", "--tolerance", "0.5", "--fallback", "split", "-o", "x.onnx"]
    assert main(["export", "moe.pt2", *flags]) == 0
    assert str(called["backend"]) == ("onnxruntime{target=cuda,dtype=float16,tokens=7,bits=8,threads=3,lowering=split}")
    assert (called["tolerance"], called["fallback"], called["measure"], str(called["output"])) == (
        0.5,
        "split",
        True,
        "x.onnx",
    )


def test_the_options_of_tvm_reach_it(called: dict[str, Any]):
    flags = ["--to", "tvm", "--target", "llvm -mcpu=znver3", "--expert-dtype", "bfloat16", "--threads", "2"]
    assert main(["export", "moe.pt2", *flags]) == 0
    backend = called["backend"]
    assert (backend.name, backend.target, backend.expert_dtype) == ("tvm", "llvm -mcpu=znver3", "bfloat16")
    assert main(["export", "moe.pt2", "--to", "tvm", "--target", "cuda", "--arch", "sm_80", "--dtype", "float16"]) == 0
    backend = called["backend"]
    assert (backend.arch, backend.dtype, backend.precision) == ("sm_80", "float16", "float16")


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--to", "tensorrt"], 2, "no backend named 'tensorrt'"),
        (["--to", "pt2"], 2, "moe.pt2 is a pt2 already"),
        (["--target", "tpu"], 2, "there is no target 'tpu'"),
        (["--bits", "8"], 2, "quantised experts need the cuda target"),
        (["--to", "tvm", "--bits", "8"], 2, "--bits is no option of the tvm backend"),
        (["--arch", "sm_90"], 2, "--arch is no option of the onnxruntime backend"),
        (["--to", "tvm", "--dtype", "float16"], 2, "float16 needs the cuda target"),
        (["--expert-dtype", "int4"], 2, "there is no expert dtype 'int4'"),
        (["--expert-dtype", "int8-48"], 2, "choose one of float32, float16, bfloat16, int8-32, int8-64, int8-128"),
        (["--expert-dtype", "int8", "--target", "portable"], 2, "the kernel lowering, which stores experts"),
        (["--expert-dtype", "int8", "--lowering", "split"], 2, "the split lowering does not store experts as int8"),
    ],
)
def test_bad_usage(
    called: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, what: str
):
    assert main(["export", "moe.pt2", *arguments]) == code
    assert what in capsys.readouterr().err


def test_a_failed_verification_leaves_with_1(called: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    called["report"] = VerificationFailed("the split lowering fails verification", where="layer.0", hint="mend it")
    assert main(["export", "moe.pt2"]) == 1
    assert capsys.readouterr().err == ("error: the split lowering fails verification\n  at: layer.0\n  hint: mend it\n")
