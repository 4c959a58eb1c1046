"""``export_file``: what is chosen, verified, written into the file, and refused with nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import moeify
from moeify.api import export as api_export
from moeify.api.export import TOLERANCE, export_file
from moeify.backends.onnxruntime import choose, contrib, split
from moeify.backends.onnxruntime.backend import OnnxRuntime
from moeify.backends.onnxruntime.session import Session, cuda_is_usable
from moeify.errors import (
    BadOption,
    OutputNotWritten,
    Refused,
    RuntimeUnavailable,
    UnknownName,
    UnreadableFile,
    UsageError,
    VerificationFailed,
)
from moeify.ir.recipe import Recipe

BAD = [
    ({"target": "tpu"}, "there is no target 'tpu'"),
    ({"dtype": "float8"}, "there is no dtype 'float8'"),
    ({"bits": 3}, "there is no bits '3'"),
    ({"bits": 8}, "quantised experts need the cuda target and float16 or bfloat16, not cpu and float32"),
    (
        {"dtype": "bfloat16"},
        "bfloat16 needs the cuda target, not cpu: ONNX Runtime's CPU provider has no kernels for it",
    ),
    ({"tokens": 0}, "the expected number of tokens is 0: it must be positive"),
]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="relu", batch_first=True)
    return nn.Sequential(
        nn.Embedding(40, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 40)
    )


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    torch.save(encoder(), folder / "dense.pt")
    moeify.convert_file(folder / "dense.pt", folder / "moe.pt2", Recipe(experts=4, top_k=2, method="drop"))
    return folder / "moe.pt2"


@pytest.fixture(autouse=True)
def translated_once(monkeypatch: pytest.MonkeyPatch, translations: dict[str, Any]) -> None:
    """torch.onnx takes seconds, and gives the same for every test here."""
    translate = OnnxRuntime.neutral

    def neutral(self: OnnxRuntime, program: Any) -> Any:
        if self.dtype not in translations:
            translations[self.dtype] = translate(self, program)
        return translations[self.dtype]

    monkeypatch.setattr(OnnxRuntime, "neutral", neutral)


@pytest.fixture(scope="module")
def translations() -> dict[str, Any]:
    return {}


def outputs(file: Path, ids: torch.Tensor) -> numpy.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]


@pytest.mark.parametrize("lowering", ["split", "kernel", "com.microsoft.MoE"])
def test_the_file_computes_what_the_program_computes(moe: Path, tmp_path: Path, lowering: str):
    report = export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(lowering=lowering))
    assert report.verified
    assert [b.lowering for b in report.blocks] == [lowering] * 2
    assert all(b.relative_error is not None and b.relative_error < 1e-5 for b in report.blocks)
    assert report.max_relative_error is not None
    assert report.max_relative_error < 1e-5
    ids = torch.randint(40, (3, 11))  # neither the batch nor the length of the example
    with torch.no_grad():
        expected = moeify.load(moe)(ids)
    numpy.testing.assert_allclose(outputs(tmp_path / "moe.onnx", ids), expected, rtol=1e-4, atol=1e-5)


def test_lowerings_can_be_measured_here(moe: Path, tmp_path: Path):
    report = export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(tokens=16), measure=True)
    assert all(block.why.endswith("measured at 16 tokens") for block in report.blocks)


def test_the_report_is_in_the_file(moe: Path, tmp_path: Path):
    report = export_file(moe, tmp_path / "moe.onnx")
    model = onnx.load(tmp_path / "moe.onnx")
    onnx.checker.check_model(model, full_check=True)
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    stored = json.loads(metadata["moeify.report"])
    assert metadata["moeify.needs_onnxruntime"] == "1.31"
    assert stored["blocks"][0]["relative_error"] == report.blocks[0].relative_error
    assert stored["recipe"]["experts"] == 4
    assert stored["versions"]["onnxruntime"] == onnxruntime.__version__
    assert {o.domain: o.version for o in model.opset_import}[""] == 23
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "seq"]


def test_the_default_output_is_beside_the_caller(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    report = export_file(moe)
    assert report.output == "moe.onnx"
    assert [f.name for f in tmp_path.iterdir()] == ["moe.onnx"]
    assert report.bytes == (tmp_path / "moe.onnx").stat().st_size


def wrong(emit, mixture):
    """A lowering that forgets the weights of the experts."""
    ones = emit.op("Div", mixture.weights, mixture.weights)
    split.lower(emit, type(mixture)(**{**mixture.__dict__, "weights": ones}))


def test_a_block_that_fails_is_named_and_nothing_is_written(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contrib, "lower", wrong)
    (tmp_path / "moe.onnx").write_text("before")
    with pytest.raises(VerificationFailed) as failure:
        export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(lowering="com.microsoft.MoE"))
    assert failure.value.where == "1.layers.0"
    assert failure.value.what.startswith("the com.microsoft.MoE lowering fails verification: the relative error is ")
    assert failure.value.hint == (
        "nothing was written; --fallback split lowers such blocks again, --tolerance accepts more"
    )
    assert [f.name for f in tmp_path.iterdir()] == ["moe.onnx"]
    assert (tmp_path / "moe.onnx").read_text() == "before"


def test_a_block_that_fails_is_lowered_again_when_the_user_says_so(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(contrib, "lower", wrong)
    report = export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(lowering="com.microsoft.MoE"), fallback="split")
    assert [b.lowering for b in report.blocks] == ["split", "split"]
    assert report.blocks[0].why == "its first lowering failed verification"
    assert report.verified
    assert any("lowered again with split" in note for note in report.notes)


def test_the_users_data_is_verified_on(moe: Path, tmp_path: Path):
    name = api_export.read_graph(moe)[0].inputs[0].name
    numpy.savez(tmp_path / "batch.npz", **{name: numpy.random.default_rng(0).integers(0, 40, (5, 7))})
    report = export_file(moe, tmp_path / "moe.onnx", data=tmp_path / "batch.npz")
    assert report.tokens_verified == 2 * 5 * 7


@pytest.mark.parametrize(("options", "what"), BAD)
def test_refuses_options(options: dict, what: str):
    with pytest.raises(BadOption) as error:
        OnnxRuntime(**options)
    assert error.value.what == what


def test_refuses_a_lowering_that_does_not_exist(moe: Path, tmp_path: Path):
    with pytest.raises(UnknownName, match="no lowering named 'splot'"):
        export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(lowering="splot"))
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_forced_lowering_that_does_not_fit(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose.contrib, "unfit", lambda *_: "it has no kernel for this")
    with pytest.raises(Refused, match="cannot take this block: it has no kernel for this"):
        export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(lowering="com.microsoft.MoE"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "error", "what"),
    [
        ("moe.pt2", UsageError, "does not end in .onnx"),
        ("none/moe.onnx", OutputNotWritten, "the folder .*none does not exist"),
        ("folder.onnx", OutputNotWritten, "it is a folder"),
    ],
)
def test_refuses_an_output_before_any_work(moe: Path, tmp_path: Path, output: str, error: type, what: str):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(error, match=what):
        export_file(moe, tmp_path / output)


def test_refuses_what_was_not_converted(tmp_path: Path):
    torch.save(encoder(), tmp_path / "dense.pt")
    with pytest.raises(UnreadableFile):
        export_file(tmp_path / "dense.pt", tmp_path / "moe.onnx")


def test_a_full_disk_leaves_nothing(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from moeify.backends.onnxruntime import save

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save.ir, "save", full)
    with pytest.raises(OutputNotWritten, match="no space left on device"):
        export_file(moe, tmp_path / "moe.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from moeify.backends.onnxruntime import backend

    find = backend.importlib.util.find_spec
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda n: None if n == "onnxscript" else find(n))
    with pytest.raises(RuntimeUnavailable) as error:
        export_file(moe, tmp_path / "moe.onnx")
    assert error.value.what == "the onnxruntime backend needs the package onnxscript, which is not installed"
    assert error.value.hint == "pip install 'moeify[onnxruntime]'"


@pytest.mark.parametrize(("expert_dtype", "block"), [("int8", 0), ("int8-32", 32)])
def test_experts_stored_in_fewer_bytes(moe: Path, tmp_path: Path, expert_dtype: str, block: int):
    """With the library or without: the report says which ran."""
    report = export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(expert_dtype=expert_dtype))
    assert {b.lowering for b in report.blocks} == {"kernel"}
    nodes = [node for node in onnx.load(tmp_path / "moe.onnx").graph.node if node.op_type == "DispatchFFN"]
    assert {a.i for node in nodes for a in node.attribute if a.name == "block"} == {block}
    assert report.tolerance == TOLERANCE["int8"]
    assert report.verified_on == f"ONNX Runtime's cpu provider with {Session(tmp_path / 'moe.onnx').kernels}"
    assert "'moeify build-kernels --print-path'" in report.notes[0]
    # 127 steps to the largest weight of a row: more than float32's rounding, far less than nonsense.
    assert all(b.relative_error is not None and 1e-5 < b.relative_error < 3e-2 for b in report.blocks)


def test_with_the_library_such_small_blocks_become_kernels(moe: Path, tmp_path: Path, kernel_library: Path):
    report = export_file(moe, tmp_path / "moe.onnx")
    assert {b.lowering for b in report.blocks} == {"kernel"}


def test_the_portable_file_runs_in_another_runtime(moe: Path, tmp_path: Path):
    report = export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(target="portable"))
    assert {b.lowering for b in report.blocks} == {"com.microsoft.MoE"}
    model = onnx.load(tmp_path / "moe.onnx")
    onnx.checker.check_model(model, full_check=True)
    ids = torch.randint(40, (2, 5))
    other = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: ids.numpy()})[0]
    numpy.testing.assert_allclose(other, outputs(tmp_path / "moe.onnx", ids), rtol=1e-4, atol=1e-5)


def test_half_precision_for_cuda_says_what_was_and_was_not_run(moe: Path, tmp_path: Path):
    report = export_file(moe, tmp_path / "moe.onnx", OnnxRuntime(target="cuda", dtype="float16"))
    assert {b.lowering for b in report.blocks} == {"com.microsoft.MoE"}
    assert report.provider == ("cuda" if cuda_is_usable() else "cpu")
    assert report.notes[0].startswith("float16: weights rounded by at most ")
    # A unit in the last place of float16 is 1e-3; a sum of 32 of them that loses more than one has an error.
    assert all(b.relative_error is not None and b.relative_error < 5e-3 for b in report.blocks)
    assert not [one for one in report.placements if one["matters"]]
    assert {i.data_type for i in onnx.load(tmp_path / "moe.onnx").graph.initializer} >= {onnx.TensorProto.FLOAT16}
