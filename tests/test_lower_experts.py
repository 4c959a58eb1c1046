"""lower-experts: one operator into three, with the same result."""

from __future__ import annotations

import pytest
import torch

from moeify.ir.metadata import outputs
from moeify.ir.printer import program_text
from moeify.passes.lower_experts import LowerExperts
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import programs
from tests.test_make_experts import MAKERS
from tests.test_route import routed


def lower(made):
    log = Log()
    LowerExperts().apply(made, log)
    for rule in ALWAYS:
        rule(made)
    return log.lines


def targets(made):
    return [str(node.target) for node in made.graph.nodes]


def test_graph(golden):
    made = programs.gated()
    routed(made)
    assert lower(made) == ["1 dispatches taken apart"]
    golden("lower-experts", program_text(made, "lower-experts"))


@pytest.mark.parametrize("maker", MAKERS)
def test_outputs_stay(maker):
    made = MAKERS[maker]()
    routed(made)
    before, after = programs.outputs_before_and_after(made, lower)
    assert torch.equal(after, before)
    assert "moeify.dispatch_ffn.default" not in targets(made)


def test_rows_know_their_number():
    made = programs.plain()
    routed(made)
    lower(made)
    rows, tokens = (
        next(n for n in made.graph.nodes if str(n.target) == f"moeify.{op}.default").meta["val"].shape
        for op in ("experts", "unpermute")
    )
    assert str(rows[0]) == f"2*{tokens[0]}"


def test_every_call_keeps_one_output():
    made = programs.shared_weights()
    routed(made)
    assert lower(made) == ["2 dispatches taken apart"]
    assert len(outputs(made.graph)) == 2


def test_leaves_a_block_alone_whose_activation_has_no_name():
    made = programs.custom()
    routed(made)
    before = targets(made)
    assert lower(made) == ["0 dispatches taken apart"]
    assert targets(made) == before
