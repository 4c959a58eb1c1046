"""``make_plan``: the figures of a model, their sources, and the settings it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeify.distributed.labels import ASSUMED, GIVEN, MEASURED, Figure, weakest
from moeify.distributed.mixtures import mixtures, parameters_outside
from moeify.distributed.network import Machine
from moeify.distributed.plan import make_plan
from moeify.distributed.setting import Setting
from moeify.errors import BadOption, NotDivisible, Refused
from tests import programs
from tests.plan_model import MIXTURE, MODEL
from tests.test_route import routed

MACHINE = Machine().with_values(
    {"intra_latency": 0, "intra_bandwidth": 1e9, "peak": 1e12, "memory_bandwidth": 1e12, "memory": 1e10}
)


def tokens(count: int) -> Figure:
    return Figure(count, "tokens", GIVEN)


def test_figures_worked_by_hand():
    plan = make_plan(MODEL, Setting(8, tokens=tokens(10**6)), MACHINE)
    (block,) = plan.blocks
    forward, backward = block.forward, block.backward
    assert forward["parameters"].value == 8 * 3 * 4096 * 1024 + 8 * 4096
    assert forward["flops_per_token"].value == 2 * (2 * 3 * 4096 * 1024 + 8 * 4096)
    # gated: 3 matrices forward; 3 for the rows, 3 for the weights and 2 again backward
    assert backward["flops_per_token"].value == 2 * (2 * 8 * 4096 * 1024 + 2 * 8 * 4096)
    assert forward["weights_per_rank"].value == 2 * (3 * 4096 * 1024 + 8 * 4096)
    assert forward["training_state_per_rank"].value == 16 * (3 * 4096 * 1024 + 8 * 4096)
    assert forward["rows_per_expert"].value == 2e6
    assert forward["bytes_per_token"].value == backward["bytes_per_token"].value == 28672
    # 10^6 tokens are all but even; the counts are 64 bytes
    uneven = forward["imbalance"].value
    assert 1 <= uneven < 1.01
    assert forward["exchange_flat"].value == pytest.approx(28.672 * uneven + 56e-9)
    assert backward["exchange_flat"].value == pytest.approx(28.672 * uneven)
    rows = 2e6 * uneven
    assert forward["compute"].value == pytest.approx(2 * (rows * 3 * 4096 * 1024 + 1e6 * 8 * 4096) / 1e12)
    assert backward["compute"].value == pytest.approx(2 * (rows * 8 * 4096 * 1024 + 2e6 * 8 * 4096) / 1e12)
    best = forward["exchange_flat"].value / forward["compute"].value
    assert forward["exchange_over_compute"].value == pytest.approx(best)
    # 1 FLOP per byte: a weight of 2 bytes is read as fast as one row uses it; 1 * 8 / (2 * 8) tokens
    assert forward["token_budget"].value == 1
    assert forward["drop_share"].value == 0


def test_the_whole_model_sums_blocks_and_calls():
    twice = dataclasses.replace(MIXTURE, path="b", anchor="b", calls=2)
    one = make_plan(MODEL, Setting(8), MACHINE)
    both = make_plan(dataclasses.replace(MODEL, mixtures=(MIXTURE, twice)), Setting(8), MACHINE)
    for name in ("exchange_flat", "compute"):
        assert both.whole[name].value == pytest.approx(3 * one.whole[name].value)
    weights = one.blocks[0].forward["weights_per_rank"].value
    assert both.whole["weights_per_rank"].value == 2 * weights + 2000
    inference = make_plan(MODEL, Setting(8), MACHINE, training=False)
    assert inference.whole["compute"].value == pytest.approx(one.blocks[0].forward["compute"].value)
    state = inference.whole["weights_per_rank"].value
    per_token = inference.blocks[0].forward["exchange_buffers_per_rank"].value / 4096
    assert inference.whole["tokens_that_fit"].value == int((1e10 - state) / per_token)


def test_blocks_that_are_alike_are_one_entry():
    alike = dataclasses.replace(MIXTURE, path="b", anchor="b")
    model = dataclasses.replace(MODEL, mixtures=(MIXTURE, alike))
    assert [block.paths for block in make_plan(model, Setting(8)).blocks] == [["a", "b"]]
    loads = {"a": [1.0] * 8, "b": [1.0] * 7 + [2.0]}
    assert [block.paths for block in make_plan(model, Setting(8, loads=loads)).blocks] == [["a"], ["b"]]


def test_loads_reach_imbalance_and_times():
    loads = {"a": [4.0, 4, 1, 1, 1, 1, 0, 0]}
    plain = make_plan(MODEL, Setting(4, tokens=tokens(10**6), loads=loads), MACHINE).blocks[0].forward
    assert plain["imbalance"].value == pytest.approx(8 * 4 / 12, rel=1e-2)
    assert plain["imbalance_placed"].value == pytest.approx(4 * 4 / 12, rel=1e-2)
    assert plain["imbalance_with_copies"].value == pytest.approx(1, abs=0.2)
    placed = Setting(4, tokens=tokens(10**6), loads=loads, placed=True)
    there = make_plan(MODEL, placed, MACHINE).blocks[0].forward
    assert there["exchange_flat"].value < 0.55 * plain["exchange_flat"].value


def test_capacity_multiplies_bytes_and_drops():
    setting = Setting(8, mode="capacity", tokens=tokens(4096), capacity_factor=Figure(1.5, "", GIVEN))
    forward = make_plan(MODEL, setting, MACHINE).blocks[0].forward
    assert forward["bytes_per_token"].value == 1.5 * 28672
    assert forward["imbalance"].value == 1
    assert 0 <= forward["drop_share"].value < 1e-6
    tight = dataclasses.replace(setting, capacity_factor=Figure(0.5, "", GIVEN))
    assert make_plan(MODEL, tight, MACHINE).blocks[0].forward["drop_share"].value == pytest.approx(0.5, abs=1e-6)


def test_a_number_has_the_weakest_source_of_those_it_comes_from():
    assert weakest(Figure(1, "", MEASURED), GIVEN) == GIVEN
    assert weakest(MEASURED, ASSUMED, GIVEN) == ASSUMED
    assumed = make_plan(MODEL, Setting(8)).blocks[0].forward
    assert assumed["parameters"].source == MEASURED
    assert assumed["compute"].source == assumed["exchange_flat"].source == ASSUMED
    said = Setting(8, per_node=Figure(8, "", GIVEN), tokens=tokens(64), loads={"a": [1.0] * 8}, loads_source=MEASURED)
    given = make_plan(MODEL, said, MACHINE).blocks[0].forward
    assert given["compute"].source == given["exchange_flat"].source == given["imbalance"].source == GIVEN


def test_scaling_runs_from_8_to_4096_and_shares_what_there_is():
    many = dataclasses.replace(MIXTURE, experts=64, top_k=4)
    plan = make_plan(dataclasses.replace(MODEL, mixtures=(many,)), Setting(4096))
    assert [point.ranks for point in plan.scaling] == [2**n for n in range(3, 13)]
    assert [point.expert_ranks for point in plan.scaling] == [8, 16, 32, *[64] * 7]
    assert (plan.expert_ranks, plan.replicas) == (64, 64)
    assert plan.scaling[1].exchange_deduplicated.value < plan.scaling[1].exchange_flat.value
    assert plan.scaling[-1].efficiency.value < plan.scaling[0].efficiency.value


@pytest.mark.parametrize(
    ("setting", "kind", "message", "hint"),
    [
        (
            {"devices": 8, "mode": "capacity", "expert_ranks": 8}, NotDivisible,
            "12 experts do not split evenly over 8 ranks, as mode capacity needs",
            "choose one of 1, 2, 4, or mode dropless",
        ),
        (
            {"devices": 16, "expert_ranks": 6}, BadOption, "6 ranks for the experts do not fit 16 devices, 8 to a node",
            "choose one of 1, 2, 4, 8, 16",
        ),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit(setting: dict[str, Any], kind, message, hint):
    model = dataclasses.replace(MODEL, mixtures=(dataclasses.replace(MIXTURE, experts=12),))
    with pytest.raises(kind) as caught:
        make_plan(model, Setting(**setting))
    assert (caught.value.what, caught.value.hint) == (message, hint)


def test_uneven_experts_and_ranks_without_any():
    model = dataclasses.replace(MODEL, mixtures=(dataclasses.replace(MIXTURE, experts=3),))
    assert make_plan(model, Setting(8)).expert_ranks == 2
    plan = make_plan(model, Setting(8, expert_ranks=4, tokens=tokens(10**6)))
    assert plan.blocks[0].forward["imbalance"].value == pytest.approx(4 / 3, rel=1e-2)
    assert "1 of 4 ranks hold none of 3 experts" in plan.notes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": 0}, "devices is 0: it must be a whole number of at least 1"),
        ({"devices": 8, "tokens": Figure(2.5)}, "tokens is 2.5: it must be a whole number of at least 1"),
        ({"devices": 8, "extra": -1}, "extra is -1: it must be a whole number of at least 0"),
        ({"devices": 12}, "12 devices do not fill nodes of 8"),
        ({"devices": 8, "mode": "dense"}, "there is no mode 'dense'"),
        ({"devices": 8, "skew": Figure(-1.0)}, "skew is -1: it must be a number of at least 0"),
        ({"devices": 8, "capacity_factor": Figure(0.0)}, "capacity-factor is 0: it must be a finite positive number"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(BadOption) as caught:
        Setting(**fields)
    assert caught.value.what == message


def test_loads_of_another_model():
    with pytest.raises(BadOption, match="the loads say nothing of a"):
        make_plan(MODEL, Setting(8, loads={"b": [1.0]}))
    with pytest.raises(BadOption, match="the loads of a are 2, and it has 8 experts"):
        make_plan(MODEL, Setting(8, loads={"a": [1.0, 2.0]}))


def test_a_model_without_experts():
    with pytest.raises(Refused, match="m has no mixture of experts to plan for"):
        make_plan(dataclasses.replace(MODEL, mixtures=()), Setting(8))


def test_mixtures_are_read_off_the_graph():
    made = programs.shared_weights(experts=4, shared=1, top_k=2)
    routed(made)
    (one,) = mixtures(made)
    D, F = programs.D, programs.F
    assert (one.calls, one.d_model, one.d_expert, one.experts, one.top_k, one.item) == (2, D, F, 4, 2, 4)
    named = dict(made.graph_module.named_parameters())
    own = sum(p.numel() for name, p in named.items() if name.startswith(("layers.1.experts", "layers.1.shared")))
    assert one.parameters == own + 4 * D
    elements, size = parameters_outside(made, [one])
    read = {node.target for node in made.graph.find_nodes(op="get_attr")}
    assert elements == sum(p.numel() for name, p in named.items() if name in read) - one.parameters
    assert size == 4 * elements
