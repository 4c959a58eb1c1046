"""Names that a user of the file sees, and nothing of the machine it was made on."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import onnx_ir as ir
import pytest
import torch
from torch.utils._pytree import tree_structure

from moeify.backends.onnxruntime.naming import clear_notes, name_dimensions, name_outputs
from moeify.ir.program import InputSpec
from tests.onnx_mixtures import proto

Pair = namedtuple("Pair", "left right")


def model(*outputs: str, domain: str = "") -> ir.Model:
    """Inputs ``x`` and ``logits``, one Neg of x for each output name; ``x`` itself is an output where it says so."""
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["s7", ir.SymbolicDim("s7*s12"), 3])
    inputs = [ir.Value(name=name, type=kind, shape=shape) for name in ("x", "logits")]
    nodes, values = [], {"x": inputs[0]}
    for name in dict.fromkeys(outputs):
        if name != "x":
            node = ir.node("Neg", [inputs[0]], name=f"make_{name}", domain=domain)
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, kind, shape
            nodes.append(node)
            values[name] = node.outputs[0]
    graph = ir.Graph(inputs, [values[o] for o in outputs], nodes=nodes, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def names(made: ir.Model) -> list[str | None]:
    proto(made)  # the checker wants unique names
    return [value.name for value in made.graph.outputs]


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (0, ["output_0"]),
        ((0, 0), ["output_0", "output_1"]),
        ({"last_hidden_state": 0, "pooler_output": 0}, ["last_hidden_state", "pooler_output"]),
        (OrderedDict(a=0, b=(0, 0)), ["a", "b.0", "b.1"]),
        ((0, {"a": 0}), ["output_0", "1.a"]),
        ({"past": [{"key": 0}, {"key": 0}]}, ["past.0.key", "past.1.key"]),
        (Pair(0, 0), ["left", "right"]),
        ({"logits": 0}, ["logits_1"]),  # an input has that name
        ({"b": 0, "a": 0}, None),
    ],
)
def test_outputs_have_the_names_of_the_structure(structure, expected):
    tree = tree_structure(structure)
    made = model(*(f"neg_{i}" for i in range(tree.num_leaves)))
    name_outputs(made, tree, keep="moeify")
    assert names(made) == (expected or list(structure))
    assert all(node.op_type == "Neg" for node in made.graph)


def test_numbers_and_none_in_the_structure_are_not_outputs():
    made = model("neg_0")
    name_outputs(made, tree_structure({"loss": None, "logits": 0}), keep="moeify")
    assert names(made) == ["output_0"]


def test_one_value_twice_and_an_input():
    made = model("neg", "neg", "x")
    name_outputs(made, tree_structure({"a": 0, "b": 0, "c": 0}), keep="moeify")
    assert names(made) == ["a", "b", "c"]
    assert [node.op_type for node in made.graph] == ["Neg", "Identity", "Identity"]


def test_values_that_are_looked_up_keep_their_name():
    made = model("dispatch_ffn", domain="moeify")
    name_outputs(made, tree_structure({"y": 0}), keep="moeify")
    assert [value.name for value in made.graph.outputs] == ["y"]
    assert made.graph[0].outputs[0].name == "dispatch_ffn"


def test_dimensions_have_the_users_names():
    made = model("neg")
    made.graph.inputs[1].shape = ir.Shape([ir.SymbolicDim("s12"), "s7", "s123"])
    specs = (
        InputSpec("x", torch.float32, ("batch", "both", 3)),
        InputSpec("logits", torch.float32, ("seq", "batch", "more")),
    )
    name_dimensions(made, specs)
    assert str(made.graph.inputs[0].shape) == "[batch,batch*seq,3]"
    assert str(made.graph.inputs[1].shape) == "[seq,batch,more]"
    assert str(made.graph.outputs[0].shape) == "[batch,batch*seq,3]"


def test_notes_are_cleared():
    made = model("neg")
    for thing in (made, made.graph, made.graph[0], made.graph[0].outputs[0], made.graph.inputs[0]):
        thing.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/me/model.py"
        thing.doc_string = "File /home/me/model.py"
    clear_notes(made)
    assert b"model.py" not in proto(made).SerializeToString()
