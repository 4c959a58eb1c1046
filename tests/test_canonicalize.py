"""canonicalize: what goes, what stays, and that not a bit of the function changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim

from moeify.ir.program import Program, flat
from moeify.passes.canonicalize import Canonicalize
from moeify.pipeline.base import Log
from moeify.pipeline.rules import lints


class Call(nn.Module):
    """A module of one function and one weight."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def canonical(function: Callable[..., Tensor]) -> tuple[Program, list[str], list[str]]:
    """The program, the names of its operators, and the log; the outputs are checked to be the same bits."""
    module = Call(function).eval()
    x = torch.randn(3, 4)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    program = Program(exported.module(check_guards=False), (), (x,))
    before = _outputs_and_gradients(program)
    log = Log()
    Canonicalize().apply(program, log)
    lints(program)
    after = _outputs_and_gradients(program)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    names = [n.target._schema.name.partition("::")[2] for n in program.graph.nodes if hasattr(n.target, "_schema")]
    return program, names, log.lines


def _outputs_and_gradients(program: Program) -> list[Tensor]:
    for buffer in program.graph_module.buffers():
        buffer.zero_()
    program.graph_module.zero_grad()
    outputs = flat(program.graph_module(*[x.clone() for x in program.example]))
    sum(out.sum() for out in outputs).backward()
    return outputs + [p.grad.clone() for p in program.graph_module.parameters() if p.grad is not None]


def test_in_place_operators_become_functional() -> None:
    _, names, log = canonical(lambda m, x: m.layer(x).mul_(2.0).relu_() + 1)
    assert names == ["linear", "mul", "relu", "add"]
    assert log[0] == "2 in-place operators made functional"


def test_later_readers_of_the_written_tensor_read_the_new_value() -> None:
    def function(m: Call, x: Tensor) -> Tensor:
        u = m.layer(x)
        u.relu_()
        return u + u.sum(-1, keepdim=True)

    program, names, _ = canonical(function)
    assert names == ["linear", "relu", "sum", "add"]
    relu = next(n for n in program.graph.nodes if n.name.startswith("relu"))
    assert len(relu.users) == 2


def test_a_view_made_before_the_write_keeps_the_operator() -> None:
    def function(m: Call, x: Tensor) -> Tensor:
        u = m.layer(x)
        first = u[:, :2]
        u.relu_()
        return u + first.sum()

    _, names, log = canonical(function)
    assert "relu_" in names
    assert log[0] == "1 in-place operators kept: they write to memory that has another reader"


def test_a_write_to_a_part_keeps_the_operator() -> None:
    def function(m: Call, x: Tensor) -> Tensor:
        u = m.layer(x)
        u[:, :2].relu_()
        return u * 1.5

    _, names, _ = canonical(function)
    assert "relu_" in names


def test_an_einsum_that_only_transposes_is_a_view() -> None:
    def function(m: Call, x: Tensor) -> Tensor:
        u = m.layer(x)
        torch.einsum("ij->ji", u).relu_()
        return u * 1.5

    _, names, _ = canonical(function)
    assert "relu_" in names


def test_a_write_to_a_buffer_stays() -> None:
    def function(m: Call, x: Tensor) -> Tensor:
        m.count.add_(1.0)
        return m.layer(x) + m.count

    _, names, _ = canonical(function)
    assert "add_" in names


def test_nodes_that_return_their_operand_and_dead_nodes_go() -> None:
    def function(m: Call, x: Tensor) -> Tensor:
        u = m.layer(x)
        u.exp()
        u = torch.dropout(u.to(torch.float32), 0.0, False)[0:]
        return torch.dropout(u, 0.5, False)

    _, names, log = canonical(function)
    assert names == ["linear", "dropout"]
    assert log[1:] == ["3 nodes dropped that return their operand", "2 dead nodes dropped"]


def test_a_cast_to_another_type_stays() -> None:
    _, names, _ = canonical(lambda m, x: m.layer(x).to(torch.float64))
    assert "to" in names


def test_detach_stays_where_a_gradient_would_flow() -> None:
    _, names, _ = canonical(lambda m, x: m.layer(x).detach() * m.layer(x))
    assert "detach" in names


def test_the_text_is_its_name() -> None:
    assert str(Canonicalize()) == "canonicalize"
