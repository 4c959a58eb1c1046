"""``moeify plan``: the figures of a model, their sources, the command, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeify.api.load import load, read_graph
from moeify.cli import scaling_chart
from moeify.cli.main import main
from moeify.distributed import network
from moeify.distributed.labels import ASSUMED, GIVEN, MEASURED, Figure, weakest
from moeify.distributed.mixtures import Mixture, mixtures, parameters_outside
from moeify.distributed.network import Machine
from moeify.distributed.plan import Model, make_plan
from moeify.distributed.setting import Setting
from moeify.errors import BadOption, NotDivisible, Refused, UnreadableFile
from tests import programs
from tests.test_route import routed

# D 4096, F 1024, 8 experts, top-2, gated, bfloat16, router [8, 4096]
MIXTURE = Mixture(
    path="a", anchor="a", calls=1, d_model=4096, d_out=4096, d_expert=1024, experts=8, top_k=2, matrices=3,
    expert_weights=3 * 4096 * 1024, expert_parameters=3 * 4096 * 1024, local_weights=8 * 4096,
    local_parameters=8 * 4096, item=2,
)  # fmt: skip
MODEL = Model("m", (MIXTURE,), 1000, 2000, 10**8)
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


# --- files and the command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    torch.save(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), folder / "dense.pt")
    file = folder / "moe.pt2"
    flags = ["--method", "noise{std=0.3}", "--experts", "4", "--input", "float32[batch=2,seq=4,16]"]
    assert main(["convert", str(folder / "dense.pt"), "-o", str(file), *flags]) == 0
    torch.save({"src": torch.randn(8, 16, 16)}, folder / "data.pt")
    return file


def sources(value: Any, place: str = "plan") -> dict[str, str]:
    """The source of every number of a plan's JSON by its place. Fails for a number without one."""
    if isinstance(value, dict) and "value" in value:
        assert set(value) == {"value", "unit", "source"}, place
        assert value["source"] in ("measured", "given", "assumed"), place
        return {place: value["source"]}
    assert value is None or isinstance(value, (dict, list, str, bool)), f"{place} is a number without a source"
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {at: source for name, entry in entries for at, source in sources(entry, f"{place}.{name}").items()}


@pytest.mark.parametrize(
    "wrong",
    [{"ranks": 8}, {"share": [0.5]}, {"a": {"value": 1, "unit": ""}}, {"value": 1, "unit": "", "source": "hearsay"}],
)
def test_a_number_without_a_source_is_noticed(wrong):
    with pytest.raises(AssertionError):
        sources(wrong)


SIZES = dict.fromkeys(("calls", "d_model", "d_expert", "experts", "top_k"), "measured")
COUNTED = dict.fromkeys(("parameters", "active_parameters", "flops_per_token"), "measured")
EXCHANGES = ("exchange_flat", "exchange_hierarchical", "exchange_deduplicated")
FORWARD = (
    "exchange_buffers_per_rank", "rows_per_expert", *EXCHANGES, "compute", "exchange_over_compute", "imbalance",
    "imbalance_placed", "imbalance_with_copies", "token_budget",
)  # fmt: skip


def block_sources(load: str, compute: str, links: str) -> dict[str, str]:
    """Of a block whose tokens and loads, arithmetic and links are known so well."""
    worst = "assumed" if "assumed" in (load, compute, links) else "given"
    forward = {
        **COUNTED, **dict.fromkeys(FORWARD, load), **dict.fromkeys(EXCHANGES, links), "compute": compute,
        "exchange_over_compute": worst, "token_budget": worst, "weights_per_rank": "given", "drop_share": "given",
        "training_state_per_rank": "assumed", "bytes_per_token": "given",
    }  # fmt: skip
    both = ("flops_per_token", "bytes_per_token", *EXCHANGES, "compute", "exchange_over_compute")
    found = {f"forward.{name}": source for name, source in forward.items()}
    return {**SIZES, **found, **{f"backward.{name}": forward[name] for name in both}}


def test_every_number_of_the_command_has_its_source(converted: Path, capsys, tmp_path: Path):
    """With what the default knows, and with everything said."""
    command = ["plan", str(converted), "--devices", "8", "--json"]
    assert main(command) == 0
    found = sources(json.loads(capsys.readouterr().out))
    block = {at: source for at, source in found.items() if at.startswith("plan.blocks.0.")}
    expected = block_sources("assumed", "assumed", "assumed")
    assert block == {f"plan.blocks.0.{name}": source for name, source in expected.items()}
    assert {at: s for at, s in found.items() if at.startswith("plan.machine.")} == {
        f"plan.machine.{name}": "assumed" for name in network.UNITS
    }
    assert {at: s for at, s in found.items() if at.count(".") == 1} == {
        "plan.devices": "given", "plan.per_node": "assumed", "plan.expert_ranks": "given", "plan.replicas": "given",
        "plan.tokens": "assumed",
    }  # fmt: skip
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps({"loads": {"layers.0.linear1": [9, 1, 1, 1]}}))
    machine = ("bandwidth", "latency", "intra-bandwidth", "intra-latency", "peak", "memory-bandwidth", "memory")
    said = [text for name in (*machine, "tokens", "per-node") for text in (f"--{name}", "8")]
    assert main([*command, *said, "--loads", str(loads)]) == 0
    found = sources(json.loads(capsys.readouterr().out))
    block = {at: source for at, source in found.items() if at.startswith("plan.blocks.0.")}
    expected = block_sources("given", "given", "given")
    assert block == {f"plan.blocks.0.{name}": source for name, source in expected.items()}
    assert {source for at, source in found.items() if at.startswith(("plan.machine.", "plan.scaling."))} == {"given"}
    # The state of the optimizer, what fits beside it, and a law that was fitted elsewhere.
    assert {at.rpartition(".")[2] for at, source in found.items() if source == "assumed"} == {
        "training_state_per_rank", "tokens_that_fit", "effective", "cutoff",
    }  # fmt: skip


def test_command(converted: Path, capsys, tmp_path: Path):
    plot = tmp_path / "scaling.svg"
    arguments = ["plan", str(converted), "--devices", "4096", "--bandwidth", "25", "--plot", str(plot), "--json"]
    assert main(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["machine"]["bandwidth"] == {"value": 25e9, "unit": "B/s", "source": "given"}
    assert made["machine"]["peak"]["source"] == "assumed"
    assert len(made["scaling"]) == 10
    assert all("does not predict" in one["caveat"] for one in made["effective"])
    # Four experts fit in a node, where all exchanges are one: so are their lines.
    assert drawn(plot) == ["compute", "exchange, flat = hierarchical = deduplicated"]


def drawn(plot: Path) -> list[str]:
    """The lines that the legend of an SVG names, which matplotlib writes as comments."""
    text = plot.read_text()
    assert text.startswith("<?xml")
    return [
        words for words in re.findall(r"<!-- (.*?) -->", text) if words == "compute" or words.startswith("exchange,")
    ]


def test_lines_of_the_plot_that_part(tmp_path: Path):
    plot = tmp_path / "scaling.svg"
    many = dataclasses.replace(MIXTURE, experts=64, top_k=4)
    scaling_chart.draw(make_plan(dataclasses.replace(MODEL, mixtures=(many,)), Setting(64)), plot)
    assert drawn(plot) == ["compute", *(f"exchange, {name}" for name in ("flat", "hierarchical", "deduplicated"))]


def test_screen(converted: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["plan", str(converted), "--devices", "8", "--tokens", "64"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= max(100, len(str(converted)) + 80)
    for line in text.split("\n\n")[1].splitlines()[2:]:
        assert line.split()[-1] in ("measured", "given", "assumed"), line
    assert "it does not predict an upcycled" in " ".join(text.split())


def test_measured_loads_place_the_experts_and_the_function_stays(converted: Path, capsys, tmp_path: Path):
    output = tmp_path / "placed.pt2"
    data = str(converted.parent / "data.pt")
    flags = ["--devices", "2", "--data", data, "--write", str(output), "--json"]
    assert main(["plan", str(converted), *flags]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["blocks"][0]["forward"]["imbalance"]["source"] == "assumed"  # tokens and nodes are
    (line,) = made["placed"]
    assert 1 <= line["after"]["value"] <= line["before"]["value"]
    assert line["after"]["source"] == line["before"]["source"] == "measured"
    x = torch.randn(3, 5, 16)
    before, after = load(converted), load(output)
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x))
    assert read_graph(output)[1]["report"]["passes"][-1]["text"] == "place-experts"


def test_copies_for_inference(converted: Path, tmp_path: Path, capsys):
    output = tmp_path / "copies.pt2"
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"loads": {"layers.0.linear1": [9, 1, 1, 1]}}))
    flags = ["--devices", "2", "--loads", str(file), "--inference", "--write", str(output)]
    assert main(["plan", str(converted), *flags]) == 0
    assert "experts placed" in capsys.readouterr().out
    x, placed = torch.randn(3, 5, 16), load(output)
    with torch.no_grad():
        torch.testing.assert_close(placed(x), load(converted)(x))
    assert placed.get_parameter("layers.0.linear1.experts.up").shape[0] == 6


def test_a_dense_folder_needs_no_weights(tmp_path: Path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40,
        max_position_embeddings=32, architectures=["BertModel"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--devices", "8", "--experts", "8", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    dense = 16 * 32 * 2 + 32 + 16
    assert made["blocks"][0]["forward"]["parameters"]["value"] == 8 * dense + 8 * 16
    whole = transformers.BertModel(config).num_parameters() - dense + 8 * dense + 8 * 16
    assert made["whole"]["parameters"]["value"] == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "int8"], "there is no type 'int8' here"),
        (["--bandwidth", "0"], "bandwidth is 0: it must be a positive number"),
        (["--latency", "-1"], "latency is -1e-06: it must be a number of at least 0"),
        (["--write", "x.pt2"], "placing experts needs loads"),
        (["--loads", "a.json", "--data", "b.pt"], "loads are given and are to be measured too"),
    ],
)
def test_usage(converted: Path, capsys, flags, message):
    assert main(["plan", str(converted), "--devices", "8", *flags]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_calibration_files_go_before_defaults_and_flags_before_them(tmp_path: Path):
    measured = Machine().with_values({"intra_latency": 2e-5, "peak": 3e10}, MEASURED)
    file = tmp_path / "network.json"
    file.write_text(json.dumps(network.to_dict(measured, "here")))
    read = network.read(file)
    assert read == measured
    assert read.with_values({"peak": 5e10, "memory": None}).peak == Figure(5e10, "FLOP/s", GIVEN)
    assert read.bandwidth.source == ASSUMED
    file.write_text('{"figures": {"speed": {"value": 1, "source": "measured"}}}')
    with pytest.raises(UnreadableFile, match="is not what moeify calibrate writes"):
        network.read(file)
