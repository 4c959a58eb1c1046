"""Split models in ONNX Runtime on the CPU, 2 threads, float32: NanoGuard with 1/4 and all-MiniLM-L6-v2 with 1/2 of the
hidden units active, against the dense models in the same process, in turn.

``one block`` is the first FFN with its residual (and MiniLM's norm) as a model of its own: router, shared part,
chosen experts and biases are all in it. Figures are times as fast as dense: the median over rounds of the ratio in a
round. Each way to lower the experts is a column; ``best`` is what a user gets who picks the fastest. Bars: NanoGuard at
128 tokens, 1.8 for a block and 1.3 for the whole model.

Partitions and routers are those of real data; the projections are not repaired, which time does not see.

``python -m bench.bench_split_speed [nanoguard|minilm ...] [--threads N] [--json]``
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench import bench_split_minilm as minilm
from bench import bench_split_nanoguard as nanoguard
from bench.split_data import FIT_NOVELS, sentences
from bench.split_minilm import INPUTS as MINILM_INPUTS
from bench.split_minilm import Encoder
from bench.split_report import Bar, finish
from moeify import Recipe, frontend
from moeify.api.batches import batch
from moeify.api.convert import Dumps, rewrite
from moeify.api.progress import Silent
from moeify.api.user_data import UserData
from moeify.backends.onnxruntime import candidates, cost, measure
from moeify.ir.program import Program

TOKENS = (1, 16, 128, 512)
EXAMPLES = 200  # prompts or sentences that partition and router learn from
BARS = {"one block": 1.8, "whole model": 1.3}
BLOCK_INPUTS = "x=float32[batch=2,tokens=8,{width}]"


@dataclass(frozen=True)
class Case:
    """A model, what it learns from, and its first block: the layer whose input is the block's, and the block."""

    model: nn.Module
    inputs: list[str]
    data: list[dict[str, Tensor]]
    recipe: Recipe
    up: nn.Linear
    block: nn.Module


class NanoGuardBlock(nn.Module):
    def __init__(self, mlp: nn.ModuleDict) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["c_proj"](torch.relu(self.mlp["c_fc"](x)).square())


class MiniLMBlock(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.intermediate, self.output = layer.intermediate, layer.output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


def nanoguard_case() -> Case:
    model, fit = nanoguard.dense(), nanoguard.tokens("fit")
    which = torch.randperm(len(fit["input_ids"]), generator=torch.Generator().manual_seed(0))[:EXAMPLES]
    mlp = model.transformer["h"][0].mlp
    data = [{name: value[which] for name, value in fit.items()}]
    return Case(model, nanoguard.INPUTS, data, nanoguard.recipes("1/4")[nanoguard.MAIN], mlp["c_fc"],
                NanoGuardBlock(mlp))  # fmt: skip


def minilm_case() -> Case:
    encoder = Encoder()
    texts = random.Random(0).sample(sentences(*FIT_NOVELS), EXAMPLES)
    layer = encoder.model.encoder.layer[0]
    return Case(encoder.model, MINILM_INPUTS, encoder.batches(texts), minilm.SPLIT,
                layer.intermediate.dense, MiniLMBlock(layer))  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {"nanoguard": nanoguard_case, "minilm": minilm_case}


def block_rows(case: Case) -> Tensor:
    """What the block reads on the data, [1, rows, width], without padding."""
    seen: list[Tensor] = []
    hook = case.up.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        for one in case.data:
            case.model(**one)
    hook.remove()
    rows = [x[one["attention_mask"] != 0] for x, one in zip(seen, case.data, strict=True)]
    return torch.cat(rows).unsqueeze(0)


def timed(model: nn.Module, inputs: list[str], data: Any, recipe: Recipe, threads: int) -> list[dict[str, Any]]:
    """A row for each number of tokens: milliseconds of the dense model, and how much faster each lowering is."""
    models = {cost.DENSE: candidates.dense(frontend.capture(model, inputs))}
    program = converted(model, inputs, data, recipe)
    models |= candidates.lowered(program)[0]
    found = []
    with measure.Sessions(threads) as sessions:
        runner = candidates.Runner(models, sessions)
        for tokens in TOKENS:
            one = batch(program, tokens, tokens_of_example(program)).inputs
            calls = {name: lambda name=name, one=one: runner.call(name, one) for name in models}
            taken = measure.interleaved(calls)
            faster = {name: measure.ratio(taken, cost.DENSE, name) for name in models if name != cost.DENSE}
            found.append(
                {
                    "tokens": tokens,
                    "dense ms": round(1e3 * statistics.median(taken[cost.DENSE]), 3),
                    **{name: round(value, 2) for name, value in faster.items()},
                    "best": round(max(faster.values()), 2),
                }
            )
    return found


def converted(model: nn.Module, inputs: list[str], data: Any, recipe: Recipe) -> Program:
    """A captured copy of the model, split."""
    program = frontend.capture(model, inputs)
    program.recipe = recipe
    rewrite(program, UserData(data), type(model).__name__, Silent(), Dumps())
    return program


def tokens_of_example(program: Program) -> int:
    shape = program.example[0].shape
    return int(shape[0] * shape[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"which of {', '.join(CASES)}; all when none")
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if unknown := set(options.models) - set(CASES):
        parser.error(f"there is no model {unknown.pop()!r}: choose of {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    rows = []
    for name in options.models or CASES:
        case = CASES[name]()
        recipe = replace(case.recipe, repair=False)
        x = block_rows(case)
        parts = {
            "one block": (case.block, [BLOCK_INPUTS.format(width=x.shape[-1])], [{"x": x}]),
            "whole model": (case.model, case.inputs, case.data),
        }
        for part, (model, inputs, data) in parts.items():
            rows += [
                {"model": name, "part": part, **row} for row in timed(model, inputs, data, recipe, options.threads)
            ]
    at_bar = {row["part"]: row["best"] for row in rows if row["model"] == "nanoguard" and row["tokens"] == 128}
    bars = [Bar(f"NanoGuard, {part}, 128 tokens", at_bar[part], BARS[part], at_least=True) for part in at_bar]
    title = f"times as fast as dense in ONNX Runtime, {options.threads} threads"
    return finish(title, rows, bars, seconds=time.perf_counter() - started, as_json=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
