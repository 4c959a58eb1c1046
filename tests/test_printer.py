"""The text of a graph: what a line says, and that it is the same every time."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from moeify.ir.metadata import KEY, Tag
from moeify.ir.printer import Printer, op_name, program_text
from moeify.ir.program import InputSpec, Program
from tests import programs
from tests.view_programs import stack

TWO_LAYERS = """\
# after canonicalize
# x=float32[batch, seq, 3]
%x : f32[batch, seq, 3] = input
embed
  %linear : f32[batch, seq, 4] = aten.linear(%x, @.weight, @.bias)
layers.0
  %linear_1 : f32[batch, seq, 8] = aten.linear(%linear, @.up.weight, @.up.bias)
  %relu : f32[batch, seq, 8] = aten.relu(%linear_1)
  %linear_2 : f32[batch, seq, 4] = aten.linear(%relu, @.down.weight, @.down.bias)
  %add : f32[batch, seq, 4] = aten.add.Tensor(%linear, %linear_2)
layers.1
  %linear_3 : f32[batch, seq, 8] = aten.linear(%add, @.up.weight, @.up.bias)
  %relu_1 : f32[batch, seq, 8] = aten.relu(%linear_3)
  %linear_4 : f32[batch, seq, 4] = aten.linear(%relu_1, @.down.weight, @.down.bias)
  %add_1 : f32[batch, seq, 4] = aten.add.Tensor(%add, %linear_4)
%reshape : f32[batch*seq, 4] = aten.reshape(%add_1, [batch*seq, 4])
head
  %linear_5 : f32[batch*seq, 2] = aten.linear(%reshape, @.weight, @.bias)
return (%linear_5)
"""


def by_hand(build) -> Program:
    """A program whose graph ``build(graph, x)`` makes, without any metadata."""
    root = nn.Module()
    root.register_parameter("scale", nn.Parameter(torch.ones(3)))
    root.register_buffer("lifted_tensor_7", torch.tensor(2.5))
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    module = fx.GraphModule(root, graph)
    return Program(module, (InputSpec("x", torch.float32, (2, 3)),), (torch.ones(2, 3),))


def only_line(build) -> str:
    (line,) = [line for line in program_text(by_hand(build)).splitlines() if line.strip().startswith("%y")]
    return line.strip()


def call(graph: fx.Graph, target, *args, **kwargs) -> fx.Node:
    return graph.create_node("call_function", target, args, kwargs, name="y")


def test_golden_text_of_a_captured_model() -> None:
    assert program_text(stack(2), "after canonicalize") == TWO_LAYERS


def test_the_text_of_a_clone_is_the_same() -> None:
    program = stack(2)
    assert program_text(program.clone()) == program_text(program)


def test_moe_operators_and_their_role() -> None:
    (line,) = [line for line in program_text(programs.plain(1)).splitlines() if "moe.ffn" in line]
    assert line == (
        "  %ffn : f32[s0, s1, 8] = moe.ffn(%layer_norm, @.0.up.weight, None, @.0.down.weight, "
        "@.0.up.bias, None, @.0.down.bias, 'gelu')  # .0 output"
    )


def test_nodes_without_metadata_have_no_type() -> None:
    assert only_line(lambda g, x: call(g, torch.ops.aten.relu.default, x)) == "%y = aten.relu(%x)"


def test_parameters_are_folded_into_their_readers() -> None:
    line = only_line(lambda g, x: call(g, torch.ops.aten.mul.Tensor, x, g.get_attr("scale")))
    assert line == "%y = aten.mul.Tensor(%x, @scale)"


def test_getitem_is_written_as_an_index() -> None:
    assert only_line(lambda g, x: call(g, operator.getitem, x, 1)) == "%y = %x[1]"
    assert only_line(lambda g, x: call(g, operator.getitem, x, slice(1, None))) == "%y = %x[1:]"


def test_lists_dtypes_strings_and_keywords() -> None:
    line = only_line(
        lambda g, x: call(g, torch.ops.aten.full.default, [2, 3], 1.0, dtype=torch.float32, device=torch.device("cpu"))
    )
    assert line == "%y = aten.full([2, 3], 1.0, dtype=f32, device=cpu)"


def test_tuple_values_and_roles() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        node = call(graph, torch.ops.aten.topk.default, x, 2)
        node.meta["val"] = (torch.empty(2, 2), torch.empty(2, 2, dtype=torch.int64))
        node.meta[KEY] = Tag("layers.3", 1, "router")
        return node

    assert only_line(build) == "%y : (f32[2, 2], i64[2, 2]) = aten.topk(%x, 2)  # .3 router of call 1"


def test_names_of_operators() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert op_name(x) == "input"
    assert op_name(call(graph, torch.ops.aten.add.Tensor, x, x)) == "aten.add.Tensor"
    assert op_name(call(graph, torch.ops.moeify.permute.default, x, x, 2)) == "moe.permute"
    assert op_name(call(graph, operator.getitem, x, 0)) == "getitem"


def test_unnamed_dimensions_are_numbered_in_order() -> None:
    program = stack(1)
    text = Printer(program.graph_module, ()).line(next(n for n in program.graph.nodes if n.name == "reshape"))
    assert text == "%reshape : f32[n0*n1, 4] = aten.reshape(%add, [n0*n1, 4])"


def test_a_canonical_printer_shows_shapes_and_values_of_what_has_no_name_to_compare() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (x, graph.get_attr("scale")))
        return graph.create_node(
            "call_function", torch.ops.aten.add.Tensor, (scaled, graph.get_attr("lifted_tensor_7")), name="y"
        )

    program = by_hand(build)
    printer = Printer(program.graph_module).renamed(lambda node: "n", canonical=True)
    lines = [printer.line(node) for node in program.graph.nodes if node.op == "call_function"]
    assert lines == ["%n = aten.mul.Tensor(%n, @scale:f32[3])", "%n = aten.add.Tensor(%n, @=2.5)"]
