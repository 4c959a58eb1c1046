"""Timing: what runs, in which order, on which inputs. No times are asserted."""

from __future__ import annotations

import functools

import numpy
import onnx_ir as ir
import pytest
import torch

from moeify.backends.onnxruntime import contrib, cost, dense, measure, split
from moeify.backends.onnxruntime.mixture import Mixture, Shape

SHAPE = Shape(4, 16, 24, 16, 2)
TABLE = {"split": split.lower, cost.CONTRIB: contrib.lower}


def reference(mixture: Mixture, inputs: dict[str, numpy.ndarray]) -> torch.Tensor:
    roles = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    stacked = [torch.from_numpy(mixture.array(r)) if r in mixture.stacked else None for r in roles]
    x, experts, weights = (torch.from_numpy(inputs[name]) for name in ("x", "experts", "weights"))
    return torch.ops.moeify.dispatch_ffn(x, experts, weights, *stacked, mixture.activation)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", list(TABLE))
def test_a_block_alone_computes_the_mixture(name: str, gated: bool) -> None:
    mixture = measure.synthetic(SHAPE, gated=gated, activation="silu")
    inputs = measure.block_inputs(SHAPE, 9, mixture.dtype)
    with measure.Sessions(1) as sessions:
        (y,) = sessions.open(measure.block_model(mixture, TABLE[name])).run(inputs)
    torch.testing.assert_close(torch.as_tensor(y), reference(mixture, inputs))


def test_a_block_alone_shares_the_weights_and_leaves_the_model_alone() -> None:
    mixture = measure.synthetic(SHAPE)
    model = measure.block_model(mixture, contrib.lower)
    assert mixture.node.op_type == "DispatchFFN"
    shared = [value.const_value for value in model.graph.initializers.values()]
    assert any(tensor is mixture.stacked["down"].const_value for tensor in shared)
    assert {node.domain for node in model.graph} == {"", "com.microsoft"}


@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, False)])
def test_the_dense_block_has_the_width_asked_for(gated: bool, bias: bool) -> None:
    mixture = measure.synthetic(SHAPE, gated=gated, bias=bias, activation="silu")
    model = measure.block_model(mixture, functools.partial(dense.lower, d_ff=40))
    sizes = {name.rpartition(".")[2]: tuple(value.shape) for name, value in model.graph.initializers.items()}
    wanted = {"up": (40, 16), "down": (16, 40)} | ({"gate": (40, 16)} if gated else {})
    wanted |= {"up_bias": (40,), "down_bias": (16,)} if bias else {}
    assert sizes == wanted
    inputs = measure.block_inputs(SHAPE, 5, mixture.dtype)
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    get = {name.rpartition(".")[2]: torch.from_numpy(value) for name, value in weights.items()}
    expected = torch.ops.moeify.ffn(
        torch.from_numpy(inputs["x"]), get["up"], get.get("gate"), get["down"], get.get("up_bias"), None,
        get.get("down_bias"), "silu",
    )  # fmt: skip
    with measure.Sessions(1) as sessions:
        session = sessions.open(model)
        (y,) = measure.runner(session, mixture, 5)()
    torch.testing.assert_close(torch.as_tensor(y), expected)


def test_inputs_choose_different_experts_and_weigh_to_one() -> None:
    made = measure.block_inputs(Shape(8, 4, 4, 4, 3), 200, ir.DataType.FLOAT)
    assert all(len(set(row)) == 3 for row in made["experts"])
    numpy.testing.assert_allclose(made["weights"].sum(1), 1, rtol=1e-6)
    counts = numpy.bincount(made["experts"].ravel(), minlength=8)
    assert counts.min() > 40  # 75 each on the average


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: functools.partial(order.append, name) for name in "ab"}
    taken = measure.interleaved(calls, 3)
    assert {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3}
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 3


def test_every_timed_call_comes_after_an_untimed_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SETTLE", 0.0)
    order: list[str] = []
    measure.interleaved({name: functools.partial(order.append, name) for name in "ab"}, 2)
    assert order == ["a", "a", "b", "b"] * 2


def test_a_ratio_is_the_median_of_the_ratios_within_a_round() -> None:
    assert measure.ratio({"a": [1.0, 10.0, 4.0], "b": [2.0, 5.0, 4.0]}, "a", "b") == 1.0


def test_blocks_of_one_shape_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def seconds(mixture: Mixture, lowerings: dict, *, tokens: int, threads: int) -> dict[str, float]:
        timed.append((mixture.shape, sorted(lowerings), tokens, threads))
        return dict.fromkeys(lowerings, 1.0)

    monkeypatch.setattr(measure, "seconds", seconds)
    times = measure.measure(TABLE, tokens=7, threads=1)
    for _ in range(2):
        assert times(measure.synthetic(SHAPE), ["split"]) == {"split": 1.0}
    times(measure.synthetic(SHAPE, activation="relu"), ["split"])
    assert timed == [(SHAPE, ["split"], 7, 1)] * 2


def test_seconds_gives_a_time_for_each_lowering() -> None:
    mixture = measure.synthetic(SHAPE)
    taken = measure.seconds(mixture, TABLE, tokens=3, threads=1, rounds=1)
    assert taken.keys() == TABLE.keys()
    assert all(0 < seconds < 60 for seconds in taken.values())


def test_peaks_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_GEMM", 64)
    monkeypatch.setattr(measure, "_STREAM_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "interleaved", lambda calls, rounds: {name: [0.5, 0.25] for name in calls})
    assert measure.peak_flops() == 2 * 64**3 / 0.25
    assert measure.peak_bandwidth() == (1 << 16) / 0.25
