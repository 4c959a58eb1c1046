"""all-MiniLM-L6-v2 split: does it find the same words alike, with 1/2 of the hidden units active?

Tested on WordSim353 and SimLex999, the rank correlation (Spearman) of the cosine of two words' embeddings with what
people say, and on 500 sentences of a novel, the mean cosine of a sentence's embedding with the dense model's. Fitted to
1000 words and pairs of words, and 500 sentences, to four times as many, or trained on top of that to give the dense
model's embeddings; none of these texts is in a test (``bench/split_data.py``). ``held out`` are cosines on others of
the same novels, by which the training's settings were chosen. Bar: the correlations at most 0.01 below the dense
model's.

The bar says little alone: a correlation can stay where the embeddings move, which the cosine shows, and the
controls show that a random split with the repair holds it too.

``python -m bench.bench_split_minilm [--threads N] [--json]``
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

import moeify
from bench.split_data import TEST_NOVEL, sentences, word_pairs
from bench.split_minilm import FEW, INPUTS, MANY, Encoder, held_out, to_fit, trained
from bench.split_report import Bar, finish
from moeify import Recipe
from moeify.fitting import profile_file

TEST_SENTENCES = 500
SIZES = {"shared": 7, "experts": 9, "top_k": 1}  # 8 of 16 parts of 96 hidden units
BAR = 0.01
SPLIT = Recipe(method="split-energy", **SIZES)
RECIPES = {
    "split-energy": SPLIT,
    "split-energy, no repair": Recipe(method="split-energy", **SIZES, repair=False),
    "split-random": Recipe(method="split-random", **SIZES),
    "split-random, no repair": Recipe(method="split-random", **SIZES, repair=False),
}
MORE, MAIN = "split-energy, 4 x the texts", "the same, distilled"
TOKENS = 10**6  # all there are


def correlations(encoder: Encoder, model: nn.Module) -> dict[str, float]:
    found = {}
    for name, pairs in word_pairs().items():
        first, second = (encoder.embed(model, [pair[i] for pair in pairs]) for i in (0, 1))
        found[name] = float(spearmanr((first * second).sum(1), [score for _, _, score in pairs]).statistic)
    return found


def models(encoder: Encoder) -> Iterator[tuple[str, nn.Module, float]]:
    """The recipes, what they make of the dense model, and the seconds that takes."""
    profiles = {
        size: moeify.profile(encoder.model, to_fit(encoder, *size), inputs=INPUTS, tokens=TOKENS)
        for size in (FEW, MANY)
    }

    def timed(name: str, make: Callable[[], nn.Module]) -> tuple[str, nn.Module, float]:
        started = time.perf_counter()
        return name, make(), time.perf_counter() - started

    def convert(recipe: Recipe) -> nn.Module:
        return moeify.convert(copy.deepcopy(encoder.model), recipe, inputs=INPUTS, profile=profiles[FEW])

    with tempfile.TemporaryDirectory() as folder:
        split, kept = Path(folder, "split.pt2"), Path(folder, "profile.safetensors")

        def write() -> nn.Module:
            profile_file.write(profiles[MANY], kept)
            moeify.convert_file(encoder.folder, split, SPLIT, inputs=INPUTS, profile=kept)
            return moeify.load(split).eval()

        for name, recipe in RECIPES.items():
            yield timed(name, functools.partial(convert, recipe))
        yield timed(MORE, write)
        yield timed(MAIN, lambda: trained(encoder, split))


def measure() -> list[dict[str, Any]]:
    encoder = Encoder()
    texts = random.Random(1).sample(sentences(TEST_NOVEL), TEST_SENTENCES)
    rows: list[dict[str, Any]] = [{"recipe": "dense", **_rounded(correlations(encoder, encoder.model))}]
    for name, made, seconds in models(encoder):
        found = moeify.quality(encoder.model, made, encoder.batches(texts), inputs=INPUTS, tokens=TOKENS)
        hidden = next(one for one in found.outputs if one.name == "last_hidden_state")
        rows.append(
            {
                "recipe": name,
                **_rounded(correlations(encoder, made)),
                "sentences": f"{encoder.cosine(made, texts):.4f}",
                "tokens": f"{hidden.cosine:.4f}",
                "held out": ", ".join(f"{encoder.cosine(made, one):.4f}" for one in held_out()),
                "seconds": f"{seconds:.0f}",
            }
        )
    return rows


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(figure, 4) for name, figure in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    rows = measure()
    by_name = {row["recipe"]: row for row in rows}
    bars = [
        Bar(f"{name} below dense", round(by_name["dense"][name] - by_name[MAIN][name], 4), BAR) for name in word_pairs()
    ]
    title = f"all-MiniLM-L6-v2, 1/2 active: correlation with people, cosine with dense, {options.threads} threads"
    return finish(title, rows, bars, seconds=time.perf_counter() - started, as_json=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
