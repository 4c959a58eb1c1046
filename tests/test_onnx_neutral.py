"""A Program in ONNX before any lowering: neutral nodes, the user's names, the program's own memory, refusals."""

from __future__ import annotations

import collections

import numpy
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from moeify.backends.exporting import export
from moeify.backends.onnxruntime.lowering import neutral
from moeify.backends.onnxruntime.mixture import array
from moeify.backends.onnxruntime.neutral import DOMAIN, to_onnx
from moeify.errors import NotExportable
from tests import programs
from tests.onnx_mixtures import find
from tests.test_route import routed


def model(made) -> ir.Model:
    routed(made)
    return neutral(made).model


def counts(made: ir.Model) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in made.graph if node.domain == DOMAIN))


def test_a_program():
    made = programs.gated(2)
    routed(made)
    made.materialise()
    source = neutral(made).model
    assert counts(source) == {"DispatchFFN": 2}
    assert source.graph.opset_imports[""] == 23
    assert str(source.graph.inputs[0].shape) == "[s0,s1]"
    assert str(source.graph.outputs[0].shape) == "[s0,s1,3]"
    assert [value.name for value in source.graph.outputs] == ["output_0"]
    top_k = find(source, "TopK")
    assert array(top_k.inputs[1]).tolist() == [2], "the router's sort became a choice of k"
    for name, value in made.graph_module.named_parameters():
        if ".experts." in name:
            assert numpy.shares_memory(array(source.graph.initializers[name]), value.detach().numpy())
    text = ir.to_proto(source).SerializeToString()
    assert b"pkg.torch" not in text
    assert __file__.rpartition("/")[0].encode() not in text


def test_three_steps():
    assert counts(model(programs.custom())) == {"Permute": 1, "GroupedLinear": 2, "Unpermute": 1}


def test_names_of_nodes_are_names_of_values():
    made = programs.shared_weights()
    routed(made)
    source = neutral(made)
    named = {value.name: node.op_type for node in source.model.graph for value in node.outputs}
    assert [named[call.output] for call in source.calls] == ["DispatchFFN"] * 2


def test_no_noise_is_left():
    source = model(programs.plain(router="switch{jitter=0.1}", top_k=1))
    assert not [node for node in source.graph if node.op_type.startswith("Random")]
    assert counts(source) == {"DispatchFFN": 1}


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict:
        return {"x": x + 1, "last_hidden_state": x * 2, "past": ({"key": x.sin()}, {"key": x.cos()}), "same": x}


def test_outputs_have_names():
    made = programs.capture(Named(), torch.randn(2, 3))
    source = to_onnx(export(made), made.inputs)
    names = [value.name for value in source.graph.outputs]
    assert names == ["x_1", "last_hidden_state", "past.0.key", "past.1.key", "same"]
    onnx.checker.check_model(ir.to_proto(source), full_check=True)


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.mT)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.filterwarnings("ignore")
def test_refuses_what_torch_onnx_does_not_translate():
    made = programs.capture(Eigenvalues(), torch.randn(2, 3, 3), dynamic=(0,))
    with pytest.raises(NotExportable) as error:
        to_onnx(export(made), made.inputs)
    first, hint = str(error.value).splitlines()
    assert first.startswith("torch.onnx cannot translate this program: No ONNX function found for")
    assert "linalg_eigh" in first
    assert hint == "  hint: the ONNX Runtime backend takes what torch.onnx takes, and the moe operators"


def test_refuses_random_numbers():
    made = programs.capture(Noise(), torch.randn(2, 3))
    with pytest.raises(NotExportable) as error:
        to_onnx(export(made), made.inputs)
    first, where, hint = str(error.value).splitlines()
    assert first == "the program draws random numbers in evaluation (RandomNormalLike)"
    assert where.startswith("  at: File ")
    assert "test_onnx_neutral.py" in where
    assert hint == "  hint: give the numbers as an input of the model"
