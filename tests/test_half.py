"""Half-precision twins: values, types, what stays float32 and why, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.backends.calls import find_calls
from moeify.backends.exporting import export
from moeify.backends.half import half_inputs, to_half
from moeify.errors import Refused
from moeify.ir.difference import relative_error
from moeify.ir.program import Program, flat
from tests import programs
from tests.onnx_mixtures import scatter
from tests.test_route import routed

HALF = [torch.float16, torch.bfloat16]


class Captured(nn.Module):
    """A function of x and a weight [8, 8] as a model."""

    def __init__(self, function: Callable[[Captured, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.register_buffer("frequencies", 0.7 * 10000.0 ** -torch.linspace(0, 1, 4))
        self.register_buffer("mask", torch.full((5, 5), torch.finfo(torch.float32).min).triu(1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def captured(function: Callable[[Captured, Tensor], Tensor], example: Tensor | None = None) -> Program:
    example = torch.randn(2, 5, 8) if example is None else example
    return programs.capture(Captured(function), example, (0,))


def output(program: Program, *inputs: Tensor) -> Tensor:
    return flat(program.run(*(inputs or program.example)))[0]


def names(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.fixture(scope="module")
def mixture() -> Program:
    made = programs.gated(2, experts=4, top_k=2)
    routed(made)
    scatter(made)
    return made


# --- values and types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_a_mixture_computes_the_same_in_half_precision(mixture: Program, dtype: torch.dtype) -> None:
    twin, report = to_half(mixture, dtype)
    result = output(twin)
    assert result.dtype == dtype
    # A token's value goes through about ten roundings of eps / 2 each.
    assert relative_error(result.float(), output(mixture)) < 5 * torch.finfo(dtype).eps
    assert 0 < report.rounding <= torch.finfo(dtype).eps


def test_the_program_given_is_not_changed(mixture: Program) -> None:
    before = output(mixture)
    text = str(mixture.graph)
    to_half(mixture, torch.float16)
    assert {t.dtype for t in mixture.graph_module.parameters()} == {torch.float32}
    assert str(mixture.graph) == text
    assert torch.equal(output(mixture), before)


@pytest.mark.parametrize("dtype", HALF)
def test_the_twin_exports_with_dynamic_shapes_and_right_types(mixture: Program, dtype: torch.dtype) -> None:
    twin, _ = to_half(mixture, dtype)
    exported = export(twin)
    ids = torch.randint(40, (3, 7))
    assert torch.equal(exported.module(check_guards=False)(ids), output(twin, ids))
    values = {node.name: node.meta.get("val") for node in twin.graph.nodes}
    for call in find_calls(twin.graph):
        assert {values[name].dtype for name in (call.rows, call.weights, call.output)} == {dtype}
        assert not isinstance(values[call.rows].shape[0], int)


def test_meta_types_are_those_of_the_values(mixture: Program) -> None:
    twin, _ = to_half(mixture, torch.bfloat16)

    class Check(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor) and isinstance(n.meta.get("val"), Tensor):
                assert n.meta["val"].dtype == value.dtype, n.name
            return value

    with torch.no_grad():
        Check(twin.graph_module).run(*twin.example)


def test_inputs_are_cast(mixture: Program) -> None:
    twin, _ = to_half(captured(lambda m, x: x @ m.weight), torch.bfloat16)
    assert twin.inputs[0].dtype == torch.bfloat16
    assert twin.example[0].dtype == torch.bfloat16
    ids = torch.zeros(2, dtype=torch.int64)
    assert [t.dtype for t in half_inputs((ids, torch.ones(2)), torch.float16)] == [torch.int64, torch.float16]


def test_a_half_program_changes_to_the_other_half_type() -> None:
    first, _ = to_half(captured(lambda m, x: (x @ m.weight).relu()), torch.bfloat16)
    second, _ = to_half(first, torch.float16)
    assert output(second).dtype == torch.float16
    assert relative_error(output(second).float(), output(first).float()) < torch.finfo(torch.bfloat16).eps


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    twin, _ = to_half(programs.capture(Tied(), torch.randn(2, 8), (0,)), torch.float16)
    assert twin.parameter("one.weight") is twin.parameter("two.weight")
    assert twin.parameter("one.weight").dtype == torch.float16


# --- routers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_router_scores_are_float32(mixture: Program, dtype: torch.dtype) -> None:
    """Near-ties: rounded scores would choose other experts, float32 scores of the same rows do not."""
    twin, report = to_half(mixture, dtype)
    assert len(report.float32) == 2
    assert all(name.endswith(".router.weight") for name in report.float32)
    seen: list[tuple[Tensor, Tensor]] = []

    class Tap(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if "router" in str(n.args[1:2]) and n.target == torch.ops.aten.linear.default:
                seen.append((self.env[n.args[0]], value))  # type: ignore[index, arg-type]
            return value

    with torch.no_grad():
        Tap(twin.graph_module).run(*twin.example)
    assert len(seen) == 2
    for (rows, scores), name in zip(seen, report.float32):
        assert scores.dtype == torch.float32
        weight = mixture.parameter(name)
        assert torch.equal(scores, F.linear(rows, weight))
        assert not torch.equal(scores, F.linear(rows.to(dtype), weight.to(dtype)).float())


# --- what the author computes in float32 --------------------------------------------------------------------------


def rms(m: Captured, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.weight[0] * wide.to(x.dtype)


def bare_rms(square: Callable[[Tensor], Tensor]) -> Callable[[Captured, Tensor], Tensor]:
    """The same without casts, as a canonicalised float32 capture has it."""
    return lambda m, x: m.weight[0] * (x * torch.rsqrt(square(x).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("norm", [rms, bare_rms(lambda x: x.pow(2)), bare_rms(lambda x: x * x)])
def test_the_squares_of_a_norm_do_not_overflow(norm: Callable[[Captured, Tensor], Tensor]) -> None:
    made = captured(norm, 1000 * torch.randn(2, 5, 8))
    twin, _ = to_half(made, torch.float16)
    assert output(twin).dtype == torch.float16
    # Four roundings at most: x, 1 / rms, their product, the weight's.
    assert relative_error(output(twin).float(), output(made)) < 2 * torch.finfo(torch.float16).eps
    assert made.example[0].half().pow(2).isinf().any()  # the trap is real


def rotary(m: Captured, x: Tensor) -> Tensor:
    positions = torch.arange(4000, 4005, device=x.device)
    angles = positions[:, None].float() * m.frequencies[None, :].float()
    angles = torch.cat([angles, angles], -1)
    return x * angles.cos().to(x.dtype)


def bare_rotary(m: Captured, x: Tensor) -> Tensor:
    """The same without casts, as a canonicalised float32 capture has it."""
    angles = torch.arange(4000, 4005, device=x.device)[:, None] * m.frequencies[None, :]
    return x * torch.cat([angles, angles], -1).cos()


@pytest.mark.parametrize("function", [rotary, bare_rotary])
@pytest.mark.parametrize("dtype", HALF)
def test_rotary_phases_keep_their_digits(dtype: torch.dtype, function: Callable[[Captured, Tensor], Tensor]) -> None:
    made = captured(function)
    twin, report = to_half(made, dtype)
    assert report.float32 == ("frequencies",)
    assert relative_error(output(twin).float(), output(made)) < 2 * torch.finfo(dtype).eps
    rounded = (torch.arange(4000, 4005)[:, None] * made.parameter("frequencies").to(dtype).float()).cos()
    exact = (torch.arange(4000, 4005)[:, None] * made.parameter("frequencies")).cos()
    assert (rounded - exact).abs().max() > 0.1  # what rounding the frequencies would do


def test_a_cast_that_nothing_needs_leaves_no_trace() -> None:
    twin, _ = to_half(captured(lambda m, x: x.to(torch.float32) @ m.weight), torch.float16)
    assert names(twin) == ["aten.matmul.default"]


# --- constants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_masks_with_the_smallest_float32_saturate(dtype: torch.dtype) -> None:
    def attention(m: Captured, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        scores = scores.masked_fill(m.mask < 0, torch.finfo(torch.float32).min)
        return (scores + m.mask).softmax(-1) @ x

    made = captured(attention)
    twin, report = to_half(made, dtype)
    assert "mask" in report.saturated
    assert len(report.saturated) == 2
    assert torch.isfinite(twin.parameter("mask")).all()
    assert relative_error(output(twin).float(), output(made)) < 8 * torch.finfo(dtype).eps


def test_a_guard_against_zero_that_vanishes_is_reported() -> None:
    _, report = to_half(captured(lambda m, x: x / (x.abs() + 1e-12)), torch.float16)
    assert len(report.zero_guards) == 1
    assert "a constant that guards against 0 is 0 now in add" in str(report)
    assert not to_half(captured(lambda m, x: F.layer_norm(x, (8,), eps=1e-12)), torch.float16)[1].zero_guards


def test_weights_that_vanish_are_counted() -> None:
    made = captured(lambda m, x: x @ m.weight)
    with torch.no_grad():
        made.parameter("weight")[0, :3] = 1e-9
    _, report = to_half(made, torch.float16)
    assert report.vanished == {"weight": 3}
    assert "3 weights in 1 tensors became 0, most in weight" in str(report)
    assert not to_half(made, torch.bfloat16)[1].vanished


# --- refusals -----------------------------------------------------------------------------------------------------


def test_weights_that_overflow_are_named() -> None:
    made = captured(lambda m, x: x @ m.weight)
    with torch.no_grad():
        made.parameter("weight")[1, 2] = -1e5
    with pytest.raises(Refused) as error:
        to_half(made, torch.float16)
    assert str(error.value) == (
        "1 weights do not fit float16, whose largest value is 65504: weight (1e+05)\n"
        "  hint: bfloat16 has the range of float32"
    )
    assert output(to_half(made, torch.bfloat16)[0]).isfinite().all()


def test_an_operator_without_a_half_form_is_named() -> None:
    made = captured(lambda m, x: torch.linalg.inv(m.weight) @ x.transpose(1, 2))
    with pytest.raises(Refused, match=r"linalg_inv.* cannot be cast to float16: ") as error:
        to_half(made, torch.float16)
    assert error.value.where is not None
    assert "test_half.py" in error.value.where


def test_only_half_types() -> None:
    with pytest.raises(ValueError, match=r"torch.float64 is no half precision"):
        to_half(programs.plain(), torch.float64)
