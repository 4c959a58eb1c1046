"""fuse-dispatch: three operators into one, and why not."""

from __future__ import annotations

import pytest
import torch

from moeify.ir.emit import Emitter
from moeify.ir.printer import program_text
from moeify.passes.fuse_dispatch import FuseDispatch
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import programs
from tests.test_lower_experts import lower, targets
from tests.test_make_experts import MAKERS
from tests.test_route import routed


def fuse(made):
    log = Log()
    FuseDispatch().apply(made, log)
    for rule in ALWAYS:
        rule(made)
    return log.lines


def lowered(made):
    routed(made)
    lower(made)
    return made


def test_graph(golden):
    made = lowered(programs.gated())
    assert fuse(made) == ["1 dispatches fused"]
    golden("fuse-dispatch", program_text(made, "fuse-dispatch"))


def test_it_is_the_reverse_of_lower_experts():
    made = programs.plain(2)
    routed(made)
    before = targets(made)
    lower(made)
    fuse(made)
    assert targets(made) == before


@pytest.mark.parametrize("maker", MAKERS)
def test_outputs_stay(maker):
    before, after = programs.outputs_before_and_after(lowered(MAKERS[maker]()), fuse)
    torch.testing.assert_close(after, before)


def test_says_why_it_does_not_fuse():
    assert fuse(lowered(programs.custom())) == [
        "layers.0, call 0, stays in three steps: its activation has no name",
        "0 dispatches fused",
    ]
    assert fuse(lowered(programs.with_dropout())) == [
        "layers.0, call 0, stays in three steps: it drops out its hidden value",
        "0 dispatches fused",
    ]


def test_does_not_fuse_over_something_that_stands_between():
    made = lowered(programs.plain())
    unpermute = next(n for n in made.graph.nodes if str(n.target) == "moeify.unpermute.default")
    emit = Emitter(made, unpermute, "layers.0", 0, unpermute)
    unpermute.update_arg(0, emit.call("experts", torch.ops.aten.mul.Tensor, unpermute.args[0], 2.0))
    assert fuse(made) == [
        "layers.0, call 0, stays in three steps: aten.mul.Tensor stands between",
        "0 dispatches fused",
    ]


def test_does_not_fuse_what_is_read_elsewhere():
    made = lowered(programs.plain())
    experts = next(n for n in made.graph.nodes if str(n.target) == "moeify.experts.default")
    output = made.graph.output_node()
    output.args = ((*output.args[0], experts),)
    assert fuse(made) == [
        "layers.0, call 0, stays in three steps: the sorted rows are read elsewhere",
        "0 dispatches fused",
    ]


def test_does_not_fuse_parts_of_two_dispatches():
    made = lowered(programs.plain(2))
    first, second = (n for n in made.graph.nodes if str(n.target) == "moeify.unpermute.default")
    second.update_arg(1, first.args[1])
    assert fuse(made) == [
        "layers.0, call 0, stays in three steps: the sorted rows are read elsewhere",
        "layers.1, call 0, stays in three steps: rows, counts and order do not come from one moe.permute",
        "0 dispatches fused",
    ]
