"""The runner enforces the rules around passes, so that a pass cannot leave a broken program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from moeify import frontend
from moeify.errors import BrokenProgram
from moeify.ir.metadata import KEY, Tag
from moeify.ir.program import Program
from moeify.pipeline import PASSES, runner
from moeify.pipeline.base import Log, Pass
from moeify.registry import Registry


@dataclass(frozen=True)
class Breaks(Pass):
    """Breaks the program in one way.

    Before: a good program
    After: a bad one
    """

    how: str = ""
    name: ClassVar[str] = "breaks"

    def apply(self, program: Program, log: Log) -> None:
        log(f"breaking by {self.how}")
        call = next(n for n in program.graph.nodes if n.op == "call_function")
        with program.graph.inserting_before(call):
            if self.how == "missing-parameter":
                program.graph.create_node("get_attr", "no.such.weight")
            elif self.how == "untyped":
                extra = program.graph.call_function(torch.ops.aten.relu.default, (call.args[0],))
                call.replace_input_with(call.args[0], extra)
            elif self.how == "dead":
                extra = program.graph.call_function(torch.ops.moeify.normal_like.default, (call.args[0], False))
                extra.meta["val"] = call.args[0].meta["val"]
            elif self.how == "twice":
                for node in program.graph.nodes:
                    node.meta[KEY] = Tag("block", 0, "output")
            elif self.how == "order":
                program.graph._root.append(call)


@pytest.fixture
def program(monkeypatch) -> Program:
    table = Registry("pass", {**PASSES.table, "breaks": f"{__name__}:Breaks"})
    monkeypatch.setattr(runner, "PASSES", table)
    return frontend.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ["float32[batch=2,4]"])


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("missing-parameter", "after breaks, rule 'lints' is broken: "),
        ("untyped", "after breaks, rule 'typed' is broken: %relu_default has no meta['val']"),
        (
            "dead",
            "after breaks, rule 'no dead operators' is broken: %normal_like_default (moeify.normal_like.default)",
        ),
        ("twice", "after breaks, rule 'one output per call' is broken: "),
        ("order", "after breaks, rule 'lints' is broken: the graph does not lint"),
    ],
)
def test_a_broken_program_names_the_pass_and_the_rule(program: Program, how: str, text: str) -> None:
    with pytest.raises(BrokenProgram) as error:
        runner.run(program, [f"breaks{{how={how}}}"])
    assert error.value.what.startswith(text)
    assert error.value.hint == "this is a bug in moeify: please report it"


def test_history_and_observer(program: Program) -> None:
    seen = []
    runner.run(program, ["canonicalize", "breaks{how=nothing}"], lambda one, p: seen.append(str(one)))
    assert seen == ["canonicalize", "breaks{how=nothing}"]
    assert [entry.text for entry in program.history] == seen
    assert program.history[1].lines == ("breaking by nothing",)
    assert program.history[1].seconds >= 0
