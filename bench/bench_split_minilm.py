"""all-MiniLM-L6-v2 split: does it find the same words alike, with 1/2 of the hidden units active?

Tested on WordSim353 and SimLex999, the rank correlation (Spearman) of the cosine of two words' embeddings with what
people say, and on 500 sentences of a novel, the mean cosine of a sentence's embedding with the dense model's. Fitted to
1000 words and pairs of words, and 500 sentences, none of them in a test (``bench/split_data.py``). Bar: the
correlations at most 0.01 below the dense model's.

The bar says little alone: a correlation can stay where the embeddings move, which the cosine shows, and the
controls show that a random split with the repair holds it too.

``python -m bench.bench_split_minilm [--threads N] [--json]``
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import moeify
from bench.split_data import FIT_NOVELS, TEST_NOVEL, fit_words, sentences, word_pairs
from bench.split_report import Bar, finish
from moeify import Recipe

INPUTS = [
    "input_ids=int64[batch=2,seq=16]{below=30522}",
    "attention_mask=int64[batch=2,seq=16]{below=2}",
]
WORDS, SENTENCES, BATCH = 1000, 500, 50
SIZES = {"shared": 7, "experts": 9, "top_k": 1}  # 8 of 16 parts of 96 hidden units
BAR = 0.01
MAIN = "split-energy"
RECIPES = {
    MAIN: Recipe(method="split-energy", **SIZES),
    "split-energy, no repair": Recipe(method="split-energy", **SIZES, repair=False),
    "split-random": Recipe(method="split-random", **SIZES),
    "split-random, no repair": Recipe(method="split-random", **SIZES, repair=False),
}
Batches = list[dict[str, Tensor]]


class Encoder:
    """The tokenizer and the dense model."""

    def __init__(self) -> None:
        import pretrained
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(pretrained.minilm())
        self.model = AutoModel.from_pretrained(pretrained.minilm()).eval()

    def batches(self, texts: list[str]) -> Batches:
        """In order, each as long as its longest text."""
        cut = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        taken = [self.tokenizer(one, padding=True, return_tensors="pt") for one in cut]
        return [{name: one[name] for name in ("input_ids", "attention_mask")} for one in taken]

    def embed(self, model: nn.Module, texts: list[str]) -> Tensor:
        """Mean of the last hidden states over the real tokens, normalised: what the model's card prescribes."""
        found = []
        with torch.no_grad():
            for batch in self.batches(texts):
                mask = batch["attention_mask"].unsqueeze(-1)
                hidden = model(**batch)["last_hidden_state"]
                found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)


def to_fit(encoder: Encoder) -> Batches:
    """Batches of words and batches of sentences, mixed: the last rows are held out from the fit."""
    draw = random.Random(0)
    texts = draw.sample(sentences(*FIT_NOVELS), SENTENCES)
    batches = encoder.batches(fit_words(WORDS)) + encoder.batches(texts)
    draw.shuffle(batches)
    return batches


def correlations(encoder: Encoder, model: nn.Module) -> dict[str, float]:
    found = {}
    for name, pairs in word_pairs().items():
        first, second = (encoder.embed(model, [pair[i] for pair in pairs]) for i in (0, 1))
        found[name] = float(spearmanr((first * second).sum(1), [score for _, _, score in pairs]).statistic)
    return found


def measure() -> list[dict[str, Any]]:
    encoder = Encoder()
    dense, fit = encoder.model, to_fit(encoder)
    texts = random.Random(1).sample(sentences(TEST_NOVEL), SENTENCES)
    reference, heard = encoder.embed(dense, texts), encoder.batches(texts)
    profile = moeify.profile(dense, fit, inputs=INPUTS)
    rows = [{"recipe": "dense", **_rounded(correlations(encoder, dense)), "sentences": "", "tokens": "", "seconds": ""}]
    for name, recipe in RECIPES.items():
        started = time.perf_counter()
        made = moeify.convert(copy.deepcopy(dense), recipe, inputs=INPUTS, profile=profile)
        seconds = time.perf_counter() - started
        found = moeify.quality(dense, made, heard, inputs=INPUTS, tokens=10**6)
        hidden = next(one for one in found.outputs if one.name == "last_hidden_state")
        cosine = float((encoder.embed(made, texts) * reference).sum(1).mean())
        rows.append(
            {
                "recipe": name,
                **_rounded(correlations(encoder, made)),
                "sentences": f"{cosine:.4f}",
                "tokens": f"{hidden.cosine:.4f}",
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
