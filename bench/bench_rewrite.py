"""find + rewrite, without capture and without computing weights: time against the number of layers.

Bars: under 1 s for 24 layers; linear, i.e. the time per node at 96 layers within 1.5 x that at 12.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import Recipe, frontend
from moeify.ir.program import Program
from moeify.pipeline.default import FIND, REWRITE
from moeify.pipeline.runner import run

LAYERS = (12, 24, 48, 96)
ROUNDS = 5


def captured(layers: int) -> Program:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    program = frontend.capture(LlamaForCausalLM(config))
    program.recipe = Recipe(experts=8, top_k=2)
    return program


def main() -> None:
    torch.set_num_threads(2)
    programs = {layers: captured(layers) for layers in LAYERS}
    times: dict[int, list[float]] = {layers: [] for layers in LAYERS}
    for _ in range(ROUNDS):
        for layers, program in programs.items():
            fresh = program.clone()
            start = time.perf_counter()
            run(fresh, (*FIND, *REWRITE))
            times[layers].append(time.perf_counter() - start)
            assert len(fresh.converted()) == layers
    medians = {layers: statistics.median(values) for layers, values in times.items()}
    nodes = {layers: len(program.graph.nodes) for layers, program in programs.items()}
    base = medians[12] / nodes[12]
    rows = [
        {
            "layers": layers,
            "nodes": nodes[layers],
            "seconds": round(medians[layers], 4),
            "per_node_over_12_layers": round(medians[layers] / nodes[layers] / base, 3),
        }
        for layers in LAYERS
    ]
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    table = Table(title="find + rewrite, Llama layers, 8 experts each, weights pending", title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    held = medians[24] < 1.0 and rows[-1]["per_node_over_12_layers"] < 1.5
    print(f"bars (24 layers under 1 s; per-node time at 96 layers within 1.5 x of 12): {'held' if held else 'MISSED'}")
    sys.exit(not held)


if __name__ == "__main__":
    main()
