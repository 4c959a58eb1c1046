"""Staging: a file is there whole or what was there before is, weights in a file of their own included."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moeify.backends.onnxruntime import save
from moeify.errors import OutputNotWritten


def model(scale: float = 1.0) -> ir.Model:
    """y = x @ w, w [64, 64], with one inner value."""
    weight = ir.Tensor(numpy.full((64, 64), scale, dtype=numpy.float32), name="w")
    w = ir.Value(name="w", const_value=weight, type=ir.TensorType(weight.dtype), shape=ir.Shape([64, 64]))
    kind = {"type": ir.TensorType(ir.DataType.FLOAT), "shape": ir.Shape(["n", 64])}
    x, h, y = (ir.Value(name=name, **kind) for name in "xhy")
    nodes = [
        ir.Node("", "MatMul", [x, w], outputs=[h], name="product"),
        ir.Node("", "Relu", [h], outputs=[y], name="relu"),
    ]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[w], opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def run(path: Path) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return float(session.run(None, {"x": numpy.ones((1, 64), numpy.float32)})[0][0, 0])


@pytest.fixture(params=["one file", "external data"])
def external(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "external data":
        monkeypatch.setattr(save, "EXTERNAL_ABOVE", 1000)
    return request.param == "external data"


def test_the_files_are_named_and_hold_the_metadata(tmp_path: Path, external: bool):
    with save.staged(model(), tmp_path / "m.onnx") as file:
        files = file.finish({"moeify.report": "{}"})
    assert [f.name for f in files] == (["m.onnx", "m.onnx.data"] if external else ["m.onnx"])
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in files)
    assert {p.key: p.value for p in onnx.load(files[0]).metadata_props} == {"moeify.report": "{}"}
    assert run(files[0]) == 64.0


def test_nothing_is_written_without_finish(tmp_path: Path, external: bool):
    with save.staged(model(), tmp_path / "m.onnx") as file:
        assert run(file.file) == 64.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cause", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_older_file(tmp_path: Path, external: bool, cause: type[BaseException]):
    path = tmp_path / "m.onnx"
    with save.staged(model(1.0), path) as file:
        file.finish({})
    before = sorted(f.name for f in tmp_path.iterdir())
    with pytest.raises(cause), save.staged(model(2.0), path):
        raise cause
    assert sorted(f.name for f in tmp_path.iterdir()) == before
    assert run(path) == 64.0


def test_an_interruption_between_the_two_renames_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save, "EXTERNAL_ABOVE", 1000)
    path = tmp_path / "m.onnx"
    with save.staged(model(1.0), path) as file:
        file.finish({})
    replace, done = save.os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(save.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), save.staged(model(2.0), path) as file:
        file.finish({})
    assert run(path) == 64.0


def test_the_weights_of_a_replaced_file_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save, "EXTERNAL_ABOVE", 1000)
    path = tmp_path / "m.onnx"
    for scale in (1.0, 2.0, 3.0):
        with save.staged(model(scale), path) as file:
            file.finish({})
        assert run(path) == 64.0 * scale
        assert len(list(tmp_path.iterdir())) == 2


def test_a_data_file_of_somebody_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save, "EXTERNAL_ABOVE", 1000)
    (tmp_path / "m.onnx.data").write_text("mine")
    (tmp_path / "m.onnx").write_text("no ONNX file")
    with save.staged(model(), tmp_path / "m.onnx") as file:
        files = file.finish({})
    assert files[1].name == "m.onnx.1.data"
    assert (tmp_path / "m.onnx.data").read_text() == "mine"


def test_a_twin_gives_inner_values_and_the_file_does_not(tmp_path: Path, external: bool):
    with save.staged(model(), tmp_path / "m.onnx") as file:
        twin = file.with_outputs(["h", "x"])
        session = onnxruntime.InferenceSession(str(twin), providers=["CPUExecutionProvider"])
        assert [o.name for o in session.get_outputs()] == ["y", "h"]
        file.finish({})
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["y"]


def test_what_the_operating_system_refuses_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save.ir, "save", full)
    with (
        pytest.raises(OutputNotWritten, match=r"cannot write .*m\.onnx: no space left on device"),
        save.staged(model(), tmp_path / "m.onnx"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path):
    with (
        pytest.raises(OutputNotWritten, match="no such file or directory"),
        save.staged(model(), tmp_path / "none" / "m.onnx"),
    ):
        pass
