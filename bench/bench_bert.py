"""Whole models in ONNX Runtime on the CPU, 2 threads, 128 tokens: the sparse over the dense one, by every lowering and,
of the ``kernel``, by what its experts are stored in. Medians over rounds in which all models of a column take turns.

``bert``: 6 layers, hidden 768. The sparse model is a BERT of intermediate size 384 copied into 8 experts, 2 active: 768
of 3072 hidden units. The dense one has an intermediate size of 3072. Weights are random, which time does not see.

``nanoguard`` and ``minilm``: pretrained models, split by what they do on real data, with 1/4 and 1/2 of their hidden
units active (``bench_split_speed``). They are shown and have no bar here.

Bars of ``bert``: lowered as ``moeify export`` does, it takes at most 0.70 x the time of the dense one; by the
``kernel`` lowering, where its library is built, at most 0.58 x.

``python -m bench.bench_bert [bert|nanoguard|minilm ...] [--json]``
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel

import moeify
from bench import bench_split_speed as splits
from moeify import frontend
from moeify.api.batches import batch
from moeify.api.load import read_graph
from moeify.backends.deploy import Choice
from moeify.backends.onnxruntime import candidates, choose, cost, kernel, kernel_library, measure
from moeify.backends.onnxruntime.lowering import lower, neutral
from moeify.ir.program import Program

LAYERS, D, D_FF, D_EXPERT, EXPERTS, TOP_K, TOKENS, THREADS = 6, 768, 3072, 384, 8, 2, 128, 2
ROUNDS = 25
BAR, BAR_KERNEL = 0.70, 0.58
INPUTS = ["input_ids=int64[batch=2,seq=16]"]


def bert(intermediate: int, layers: int = LAYERS) -> BertModel:
    config = BertConfig(
        vocab_size=1000, hidden_size=D, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=intermediate
    )
    return BertModel(config, add_pooling_layer=False).eval()


def sparse(folder: Path, layers: int = LAYERS) -> Program:
    """Converted as a user does."""
    torch.save(bert(D_EXPERT, layers), folder / "dense.pt")
    recipe = moeify.Recipe(method="copy", experts=EXPERTS, top_k=TOP_K)
    moeify.convert_file(folder / "dense.pt", folder / "moe.pt2", recipe, inputs=INPUTS, allow=["transformers"])
    return read_graph(folder / "moe.pt2")[0]


def chosen(program: Program) -> str:
    """What ``moeify export`` lowers these blocks to."""
    built = kernel_library.is_built()
    choose_one = choose.chooser(
        "cpu", tokens=TOKENS, threads=THREADS, dtype="float32", has_library=built, tolerance=1e-4
    )
    (lowering,) = {choice.lowering for choice in lower(neutral(program), choose_one, candidates.TABLE).choices}
    return lowering


def stored(program: Program) -> dict[str, Any]:
    """The model with the kernel's experts in fewer bytes."""
    source, models = neutral(program), {}
    for storage in ("float16", "int8"):
        table = {cost.KERNEL: functools.partial(kernel.lower, storage=storage)}
        models[f"{cost.KERNEL}, {storage}"] = lower(source, lambda _: Choice(cost.KERNEL, "asked for"), table).model
    return models


def lowered(program: Program, dense: ir.Model) -> dict[str, ir.Model]:
    """The program by every lowering and storage of the kernel, and the dense model."""
    models, _ = candidates.lowered(program)
    if cost.KERNEL in models:
        models |= stored(program)
    return models | {cost.DENSE: dense}


def timed(models: dict[str, ir.Model], inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Milliseconds of each model, and its time over that of the dense one."""
    with measure.Sessions(THREADS) as sessions:
        runner = candidates.Runner(models, sessions)
        calls = {name: lambda name=name: runner.call(name, inputs) for name in models}
        taken = measure.interleaved(calls, ROUNDS)
    return {
        "median_ms": {name: round(1e3 * statistics.median(seconds), 2) for name, seconds in taken.items()},
        "over_dense": {name: round(measure.ratio(taken, name, cost.DENSE), 3) for name in models},
    }


def bert_row() -> dict[str, Any]:
    """With what ``moeify export`` chooses, and whether its bars are held."""
    with tempfile.TemporaryDirectory() as folder:
        program = sparse(Path(folder))
        lowering = chosen(program)
        models = lowered(program, candidates.dense(frontend.capture(bert(D_FF), INPUTS)))
        row = timed(models, (torch.randint(1000, (1, TOKENS)),))
    over = row["over_dense"]
    # Without the library there is no kernel to hold to its bar.
    held = over[lowering] <= BAR and over.get(cost.KERNEL, 0.0) <= BAR_KERNEL
    return row | {"chosen": lowering, "bars": {"chosen": BAR, cost.KERNEL: BAR_KERNEL}, "held": held}


def split_row(name: str) -> dict[str, Any]:
    case = splits.CASES[name]()
    dense = candidates.dense(frontend.capture(case.model, case.inputs))
    program = splits.converted(case.model, case.inputs, case.data, replace(case.recipe, repair=False))
    return timed(lowered(program, dense), batch(program, TOKENS, splits.tokens_of_example(program)).inputs)


def main() -> int:
    names = ("bert", *splits.CASES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"which of {', '.join(names)}; all when none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    if unknown := set(asked.models) - set(names):
        parser.error(f"there is no model {unknown.pop()!r}: choose of {', '.join(names)}")
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, of its pytrees
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    rows = {name: bert_row() if name == "bert" else split_row(name) for name in asked.models or names}
    held = all(row.get("held", True) for row in rows.values())
    if asked.json:
        print(json.dumps({"held": held, "models": rows}))
    else:
        show(rows)
    return 0 if held else 1


def show(rows: Mapping[str, dict[str, Any]]) -> None:
    table = Table(title=f"over dense, {TOKENS} tokens, {THREADS} threads (and the median in ms)")
    table.add_column("")
    for model in rows:
        table.add_column(model, justify="right")
    for name in dict.fromkeys(name for row in rows.values() for name in row["over_dense"]):
        cells = [
            f"{row['over_dense'][name]:.3f} ({row['median_ms'][name]:.1f})" if name in row["over_dense"] else ""
            for row in rows.values()
        ]
        table.add_row(name, *cells)
    Console().print(table)
    for model, row in rows.items():
        if "chosen" in row:
            over = row["over_dense"]
            Console().print(
                f"{model}, chosen: {row['chosen']}, {over[row['chosen']]} x dense (bar {BAR}), {cost.KERNEL}: "
                f"{over.get(cost.KERNEL, 'not built')} x (bar {BAR_KERNEL}): {'held' if row['held'] else 'MISSED'}"
            )


if __name__ == "__main__":
    sys.exit(main())
