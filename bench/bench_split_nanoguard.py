"""NanoGuard split: how many verdicts on held-out prompts stay what the dense model says, with 1/4 and 1/8 of the hidden
units active.

Fitted to 500 prompts, tested on 500 made from other templates and another novel (``bench/split_data.py``), padded to 72
tokens: at the 512 that the model was trained with, 2 % of the dense verdicts differ. Bars: 99 % at 1/4, 97 % at 1/8.

The controls say what the bars do not show: parts drawn at random, no repair, and all active parts but one shared, so
that hardly anything is left to choose.

``python -m bench.bench_split_nanoguard [--threads N] [--json]``
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

import moeify
from bench.split_data import prompts
from bench.split_report import Bar, finish
from moeify import Recipe

LENGTH = 72
INPUTS = ["input_ids=int64[batch=2,seq=16]{below=8192}", "attention_mask=int64[batch=2,seq=16]{below=2}"]
BARS = {"1/4": 0.99, "1/8": 0.97}
# Of 16 parts of 128 hidden units: shared, chosen.
SHARES = {"1/4": (2, 2), "1/8": (1, 1)}
MAIN = "split-energy"


def recipes(share: str) -> dict[str, Recipe]:
    shared, chosen = SHARES[share]
    sizes = {"shared": shared, "experts": 16 - shared, "top_k": chosen}
    found = {
        MAIN: Recipe(method="split-energy", **sizes),
        "split-energy, no repair": Recipe(method="split-energy", **sizes, repair=False),
        "split-random": Recipe(method="split-random", **sizes),
        "split-random, no repair": Recipe(method="split-random", **sizes, repair=False),
    }
    if chosen > 1:
        fixed = shared + chosen - 1
        found["split-energy, one chosen"] = Recipe(method="split-energy", shared=fixed, experts=16 - fixed, top_k=1)
    return found


def dense() -> nn.Module:
    import pretrained
    import prompt_guard

    model = prompt_guard.build().eval()
    model.load_state_dict(torch.load(pretrained.nanoguard(), weights_only=True)["model_state_dict"])
    return model


def tokens(part: str) -> dict[str, Tensor]:
    import prompt_guard

    ids, mask = prompt_guard.tokens(prompts(part))
    assert not mask[:, LENGTH:].any(), "a prompt is longer than that"
    return {"input_ids": ids[:, :LENGTH], "attention_mask": mask[:, :LENGTH]}


def measure() -> list[dict[str, Any]]:
    model, fit, test = dense(), tokens("fit"), tokens("test")
    profile = moeify.profile(model, fit, inputs=INPUTS)
    rows = []
    for share in BARS:
        for name, recipe in recipes(share).items():
            started = time.perf_counter()
            made = moeify.convert(copy.deepcopy(model), recipe, inputs=INPUTS, profile=profile)
            seconds = time.perf_counter() - started
            found = moeify.quality(model, made, test, inputs=INPUTS, classes=True, tokens=test["input_ids"].numel())
            (output,) = found.outputs
            assert output.predictions == len(test["input_ids"])
            rows.append(
                {
                    "share": share,
                    "recipe": name,
                    "agreement": round(output.agreement, 4),
                    "KL, nats": round(output.divergence, 4),
                    "rms error of the blocks": f"{max(block.rms_error for block in found.blocks):.3f}",
                    "seconds": round(seconds, 1),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    rows = measure()
    reached = {row["share"]: row["agreement"] for row in rows if row["recipe"] == MAIN}
    bars = [Bar(f"agreement at {share}", reached[share], bar, at_least=True) for share, bar in BARS.items()]
    title = f"NanoGuard, 500 prompts to fit, 500 others to test, {options.threads} threads"
    return finish(title, rows, bars, seconds=time.perf_counter() - started, as_json=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
