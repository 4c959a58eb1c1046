"""Calls of converted blocks in an exported graph."""

from __future__ import annotations

import torch

from moeify.backends.calls import Call, find_calls
from tests import programs
from tests.test_lower_experts import lower
from tests.test_route import routed


def calls(made) -> list[Call]:
    routed(made)
    return find_calls(made.graph)


def nodes(made, call: Call):
    named = {node.name: node for node in made.graph.nodes}
    return [named[name] for name in call.nodes]


def targets(made, call: Call) -> list[str]:
    return [node.target._opname for node in nodes(made, call)]


def test_fused():
    made = programs.plain(2)
    first, second = calls(made)
    assert (first.name, second.name) == ("layers.0", "layers.1")
    for call in (first, second):
        (dispatch,) = nodes(made, call)
        assert dispatch.target == torch.ops.moeify.dispatch_ffn.default
        assert [arg.name for arg in dispatch.args[:3]] == [call.rows, call.experts, call.weights]
        assert dispatch.name == call.output


def test_shared_weights_are_one_block_called_twice():
    made = programs.shared_weights()
    anchor = made.blocks[0].anchor
    assert [(call.block, call.number, call.name) for call in calls(made)] == [
        (anchor, 0, anchor),
        (anchor, 1, f"{anchor}#1"),
    ]


def test_an_activation_without_a_name():
    made = programs.custom(shared=1)
    (call,) = calls(made)
    assert targets(made, call) == ["permute", "grouped_linear", "grouped_linear", "unpermute"]
    first, *_, last = nodes(made, call)
    assert [arg.name for arg in first.args[:2]] == [call.rows, call.experts]
    assert (last.args[2].name, last.name) == (call.weights, call.output)


def test_three_steps():
    made = programs.gated(2)
    routed(made)
    lower(made)
    first, second = find_calls(made.graph)
    assert targets(made, first) == targets(made, second) == ["permute", "experts", "unpermute"]
    assert not set(first.nodes) & set(second.nodes)


def test_a_dense_program_has_none():
    assert find_calls(programs.plain().graph) == []
