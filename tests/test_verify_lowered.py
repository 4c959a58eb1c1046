"""Errors of a lowering: each call gets the runtime's rows, near-ties are counted and not compared."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from moeify.backends.calls import Call, Seen, find_calls
from moeify.backends.exporting import export
from moeify.ir.program import Program
from moeify.passes.make_experts import MakeExperts
from moeify.passes.route import Route
from moeify.pipeline.base import Log
from moeify.verify.lowered import call_errors
from tests import programs


@pytest.fixture(scope="module")
def program() -> Program:
    """Two blocks of four experts, which differ."""
    made = programs.plain(2, experts=4, top_k=2, method="drop")
    for one in (MakeExperts(), Route()):
        one.apply(made, Log())
    made.materialise()
    return made


def there(program: Program) -> tuple[fx.GraphModule, list[Call], dict[str, Seen]]:
    """The exported module, its calls, and what a perfect runtime sees in them."""
    module = export(program).module(check_guards=False)
    calls = find_calls(module.graph)
    values: dict[str, torch.Tensor] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Record(module).run(*program.example)
    return module, calls, {c.name: Seen(values[c.rows], values[c.experts], values[c.output]) for c in calls}


def test_a_perfect_runtime_has_no_error(program: Program):
    module, calls, seen = there(program)
    errors = call_errors(module, calls, seen, program.example)
    assert [(e.relative_error, e.rerouted) for e in errors.values()] == [(0.0, 0), (0.0, 0)]
    assert all(e.tokens == seen[name].rows.shape[0] for name, e in errors.items())


def test_an_error_belongs_to_its_call_alone(program: Program):
    module, calls, seen = there(program)
    first = calls[0].name
    output = seen[first].output
    seen[first] = Seen(seen[first].rows, seen[first].experts, output + 0.1 * output.abs().max())
    errors = call_errors(module, calls, seen, program.example)
    assert errors[first].relative_error == pytest.approx(0.1, rel=1e-5)
    # The second call is judged on the rows that the runtime gave for it, not on what the first error makes of them.
    assert errors[calls[1].name].relative_error == 0.0


def test_a_token_that_goes_elsewhere_is_counted_and_not_compared(program: Program):
    module, calls, seen = there(program)
    name = calls[0].name
    experts, output = seen[name].experts.clone(), seen[name].output.clone()
    experts[3] = (experts[3] + 1) % 4
    output[3] = 1e3
    seen[name] = Seen(seen[name].rows, experts, output)
    error = call_errors(module, calls, seen, program.example)[name]
    assert (error.relative_error, error.rerouted) == (0.0, 1)


def test_the_order_of_the_chosen_experts_does_not_matter(program: Program):
    module, calls, seen = there(program)
    name = calls[0].name
    seen[name] = Seen(seen[name].rows, seen[name].experts.flip(1), seen[name].output)
    assert call_errors(module, calls, seen, program.example)[name].rerouted == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_infinite_error(program: Program, wrong: float):
    module, calls, seen = there(program)
    name = calls[0].name
    output = seen[name].output.clone()
    output[0, 0] = wrong
    seen[name] = Seen(seen[name].rows, seen[name].experts, output)
    assert call_errors(module, calls, seen, program.example)[name].relative_error == float("inf")


def test_another_shape_is_an_infinite_error(program: Program):
    module, calls, seen = there(program)
    name = calls[0].name
    seen[name] = Seen(seen[name].rows, seen[name].experts, seen[name].output[:, :1])
    assert call_errors(module, calls, seen, program.example)[name].relative_error == float("inf")
