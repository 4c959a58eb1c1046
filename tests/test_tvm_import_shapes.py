"""Sizes of torch in TVM."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor, nn
from tvm import sym, tirx

from moeify.backends.tvm.families import Families
from moeify.backends.tvm.importing import import_graph
from moeify.backends.tvm.machine import machine
from moeify.backends.tvm.shapes import Symbols
from moeify.errors import Refused
from moeify.ir.program import InputSpec
from tests.tvm_run import running


class Pair(nn.Module):
    """Two inputs of one batch, which torch has a symbol for each of."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.reshape(-1), y[:, :2] * 2


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, 3).sum(1)


def _symbolic(module: nn.Module, *inputs: Tensor) -> list[torch.Size]:
    dims = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=dims, strict=False)
    return [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]


def test_dimensions_of_one_name_are_one_variable():
    shapes = _symbolic(Pair(), torch.ones(4, 3), torch.ones(4, 5))
    assert str(shapes[0][0]) != str(shapes[1][0])
    (first, _), (second, _) = Symbols().bind(shapes, [("batch", 3), ("batch", 5)])
    assert first.same_as(second)
    (first, _), (second, _) = Symbols().bind(shapes, [("batch", 3), ("other", 5)])
    assert not first.same_as(second)


def test_a_symbol_that_is_only_found_inside_a_size():
    half = torch.export.Dim("half", min=2)
    program = torch.export.export(Halves(), (torch.ones(4, 3),), dynamic_shapes=({0: 2 * half},), strict=False)
    graph = program.module(check_guards=False)
    (shape,) = [node.meta["val"].shape for node in graph.graph.nodes if node.op == "placeholder"]
    symbols = Symbols()
    ((whole, _),) = symbols.bind([shape], [("rows", 3)])
    assert str(whole) == "rows"
    assert str(symbols.size(shape[0].node.expr / 2)) == "rows // T.int64(2)"
    run = running(import_graph(graph, [InputSpec("x", torch.float32, ("rows", 3))], machine(), Families({})))
    for rows in (6, 2):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(run(x), [Halves()(x)])


def test_a_size_that_depends_on_values_is_refused():
    with pytest.raises(Refused) as refused:
        Symbols().size(sympy.Symbol("u0"))
    assert str(refused.value) == "the size u0 depends on the values of tensors"


@pytest.mark.parametrize("text", ["s + 3", "2 * s", "s * s", "Max(1, s - 2)"])
def test_expressions(text):
    shapes = _symbolic(Pair(), torch.ones(4, 3), torch.ones(4, 5))
    symbol = shapes[0][0].node.expr
    expression = sympy.sympify(text, locals={"s": symbol})
    symbols = Symbols()
    ((size, _), _) = symbols.bind(shapes, [("a", 3), ("b", 5)])
    made = symbols.size(expression)
    for value in (1, 2, 7):
        analyzer = sym.Analyzer()
        analyzer.bind(size, tirx.IntImm("int64", value))
        assert int(analyzer.simplify(made)) == int(expression.subs(symbol, value))
