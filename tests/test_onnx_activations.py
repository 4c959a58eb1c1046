"""Every named activation in ONNX operators: the numbers of its eager form, and the types that a runtime lacks."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from moeify.backends.onnxruntime.activations import _NO_FLOAT64, activate
from moeify.backends.onnxruntime.emit import Emitter
from moeify.backends.onnxruntime.neutral import OPSET
from moeify.errors import NotExportable
from moeify.ir.activations import TABLE
from tests.onnx_mixtures import TYPES, array, proto, session


def model(name: str, dtype: torch.dtype) -> ir.Model:
    """``activation(u)``, built in the place of an Identity."""
    kind = ir.TensorType(TYPES[dtype])
    u = ir.Value(name="u", type=kind, shape=ir.Shape(["n"]))
    node = ir.node("Identity", [u], name="here")
    before = ir.node("Identity", [u], name="before")  # so that `identity` has a value of its own to give
    before.outputs[0].name = "before"
    node.replace_input_with(0, before.outputs[0])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", kind, u.shape
    graph = ir.Graph([u], [y], nodes=[before, node], opset_imports={"": OPSET}, name="case")
    made = ir.Model(graph, ir_version=10)
    emit = Emitter(made, node, "block")
    emit.commit(activate(emit, name, before.outputs[0], TYPES[dtype]))
    return made


def run(name: str, u: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session(proto(model(name, u.dtype))).run(None, {"u": array(u)})[0])


@pytest.mark.parametrize("name", TABLE)
def test_float32(name):
    u = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    # The runtime's sigmoid is a rational function, 1e-7 off where it should be next to nothing; times 40 in silu.
    torch.testing.assert_close(run(name, u), TABLE[name](u), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("name", TABLE)
def test_float16_passes_the_checker_and_runs(name):
    u = torch.linspace(-8, 8, 401).half()
    # Computed in float32 between casts, or in steps that each round to float16.
    torch.testing.assert_close(run(name, u), TABLE[name](u), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("name", sorted(TABLE.keys() - _NO_FLOAT64))
def test_float64(name):
    u = torch.linspace(-40, 40, 401, dtype=torch.float64)
    torch.testing.assert_close(
        run(name, u), TABLE[name](u), rtol=1e-7, atol=1e-7
    )  # some constants are float32 attributes


@pytest.mark.parametrize("name", sorted(_NO_FLOAT64))
def test_float64_is_refused_where_there_is_no_kernel(name, monkeypatch):
    with pytest.raises(NotExportable) as error:
        model(name, torch.float64)
    assert str(error.value) == (
        f"ONNX Runtime has no float64 kernel for the activation {name}\n"
        "  at: block\n"
        "  hint: convert the model to float32 first"
    )
    monkeypatch.setattr("moeify.backends.onnxruntime.activations._NO_FLOAT64", frozenset())
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|unsupported type"):  # or the refusal is out of date
        run(name, torch.zeros(3, dtype=torch.float64))
