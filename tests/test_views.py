"""Folding, differences, and the graphs for networkx, Graphviz and GraphML."""

from __future__ import annotations

import io
import re

import networkx as nx
import pytest
import torch

from moeify.ir.layers import layers
from moeify.ir.views.diff import diff
from moeify.ir.views.dot import dot, graphml
from moeify.ir.views.folding import fold
from moeify.ir.views.graph import folded_graph, node_graph
from moeify.ir.views.labels import group_paths, label, ranges
from tests import programs
from tests.view_programs import stack


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        ([0, 1], "0-1"),
        ([0, 1, 2, 5], "0-2,5"),
        ([0, 2], "0,2"),
        ([0, 2, 4, 6], "0,2..6"),
        ([1, 4, 7], "1,4,7"),
    ],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_label_of_paths_that_differ_by_one_number() -> None:
    assert label([f"encoder.layer.{i}.mlp" for i in range(6)]) == "encoder.layer.0-5.mlp"
    assert label(["encoder.encoder_layer_0", "encoder.encoder_layer_1"]) == "encoder.encoder_layer_0-1"
    assert label(["pooler"]) == "pooler"
    assert label(["a.0", "a.0", "a.0"]) == "a.0"


def test_paths_that_differ_by_two_numbers_fold_by_the_inner_one() -> None:
    paths = [f"stages.{stage}.blocks.{block}" for stage in range(2) for block in range(3)]
    assert [label([paths[i] for i in group]) for group in group_paths(paths)] == [
        "stages.0.blocks.0-2",
        "stages.1.blocks.0-2",
    ]


def test_groups_keep_the_order_of_first_appearance() -> None:
    assert group_paths(["h.0", "pooler", "h.1", "head"]) == [[0, 2], [1], [3]]


def test_layers_are_cut_at_repeated_modules() -> None:
    found = layers(stack(2).graph)
    assert [layer.path for layer in found] == ["embed", "layers.0", "layers.1", "", "head"]
    assert [len(layer.nodes) for layer in found] == [1, 4, 4, 1, 1]


def test_each_call_of_a_shared_layer_is_a_layer() -> None:
    assert [layer.path for layer in layers(stack(3, shared=True).graph)].count("layers.0") == 3


def test_no_layer_is_cut_inside_a_block() -> None:
    found = layers(stack(2).graph, blocks=["layers"])
    assert [layer.path for layer in found] == ["embed", "layers", "", "head"]


def test_a_deep_model_folds_to_one_screen_per_distinct_layer() -> None:
    folds = fold(stack(24))
    assert [(part.label, part.count) for part in folds] == [
        ("embed", 1),
        ("layers.0-23", 24),
        ("(model)", 1),
        ("head", 1),
    ]
    assert sum(len(part.lines) for part in folds) == 7


def test_a_layer_of_another_width_is_not_folded() -> None:
    assert [part.label for part in fold(stack(4, odd=2))][1:3] == ["layers.0-1,3", "layers.2"]


def test_calls_of_one_layer_fold() -> None:
    assert [(part.label, part.count) for part in fold(stack(3, shared=True))][1] == ("layers.0", 3)


def test_layers_that_differ_in_a_constant_are_not_folded() -> None:
    program = stack(3)
    node = next(n for n in program.graph.nodes if n.name == "add_1")
    node.kwargs = {"alpha": 2}
    assert [part.label for part in fold(program)][1:3] == ["layers.0,2", "layers.1"]


def test_node_graph_has_the_tensors_as_edges() -> None:
    graph = node_graph(stack(2))
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.nodes["linear_1"]["parameters"] == "layers.0.up.weight, layers.0.up.bias"
    assert graph.nodes["linear_1"]["layer"] == "layers.0"
    assert graph.nodes["linear_1"]["shape"] == "f32[batch, seq, 8]"
    assert graph.edges["linear_2", "add"]["argument"] == 1
    assert "sym_size_int" not in "".join(graph.nodes)


def test_blocks_are_marked_in_the_node_graph() -> None:
    graph = node_graph(programs.plain(2))
    marked = {name: data["block"] for name, data in graph.nodes(data=True) if data["role"] == "output"}
    assert marked == {"ffn": "layers.0", "ffn_1": "layers.1"}


def test_folded_graph_draws_equal_layers_once() -> None:
    graph = folded_graph(stack(24))
    assert len(graph) == 1 + 1 + 4 + 1 + 1 + 1
    assert graph.nodes["relu"]["fold"] == "layers.0-23"
    assert graph.edges["add", "linear_1"]["again"]
    assert not graph.edges["linear", "linear_1"]["again"]


def test_no_difference() -> None:
    program = stack(2)
    assert diff(program, program.clone()) == []


def test_the_same_change_in_every_layer_is_shown_once() -> None:
    before = stack(3)
    after = before.clone()
    for node in after.graph.nodes:
        if node.name.startswith("relu"):
            node.target = torch.ops.aten.gelu.default
    (change,) = diff(before, after)
    assert (change.label, change.count) == ("layers.0-2", 3)
    assert [line for line in change.lines if line[0] in "+-"] == [
        "-%relu : f32[batch, seq, 8] = aten.relu(%linear)",
        "-%linear_1 : f32[batch, seq, 4] = aten.linear(%relu, @.down.weight, @.down.bias)",
        "+%gelu : f32[batch, seq, 8] = aten.gelu(%linear)",
        "+%linear_1 : f32[batch, seq, 4] = aten.linear(%gelu, @.down.weight, @.down.bias)",
    ]


def test_dot_is_balanced_and_escaped() -> None:
    program = stack(2)
    next(n for n in program.graph.nodes if n.name == "relu").name = 'a"b\\c'
    text = dot(program)
    assert text.count("{") == text.count("}") == 5
    assert r'"a\"b\\c" [label="aten.relu\na\"b\\c\nf32[batch, seq, 8]"];' in text
    # Every line is a brace, an attribute, a node or an edge between quoted names.
    quoted = r'"(?:[^"\\]|\\.)*"'
    line = re.compile(
        rf"digraph program {{|  (?:node|edge) \[.*\];|  subgraph cluster_\d+ {{|    label={quoted};|  }}|}}"
        rf"| +{quoted} \[label={quoted}.*\];|  {quoted} -> {quoted}(?: \[.*\])?;"
    )
    assert [bad for bad in text.splitlines() if not line.fullmatch(bad)] == []


def test_dot_folds_layers() -> None:
    assert 'label="layers.0-23  x24";' in dot(stack(24))
    assert len(dot(stack(24)).splitlines()) == len(dot(stack(2)).splitlines())


def test_graphml_reads_back() -> None:
    program = stack(2)
    again = nx.read_graphml(io.BytesIO(graphml(program).encode()))
    assert set(again.edges) == set(node_graph(program).edges)
    assert again.nodes["relu"]["op"] == "aten.relu"
