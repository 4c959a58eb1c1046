"""``moeify plan`` and its files: the source of every number it prints, its plot, and experts placed."""

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
from moeify.distributed.labels import ASSUMED, GIVEN, MEASURED, Figure
from moeify.distributed.network import Machine
from moeify.distributed.plan import make_plan
from moeify.distributed.setting import Setting
from moeify.errors import UnreadableFile
from tests.plan_model import MIXTURE, MODEL


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
