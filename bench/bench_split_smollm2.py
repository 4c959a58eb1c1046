"""SmolLM2-135M split: perplexity on held-out text over that of the dense model, with 3/4 and 1/2 of the hidden units
active.

Fitted to 8192 tokens of two novels, tested on 8192 of a third (``bench/split_data.py``), pieces of 512 tokens. Bars:
1.03 at 3/4 and 1.15 at 1/2, better than CMoE at both, and a conversion (profile, fit, verification) within 10 minutes
on 2 threads.

CMoE is arXiv 2502.04416 as its authors have it: 8 parts, half of the active ones shared, a unit fires on a token when
it is among the 10 largest, the router is one representative hidden unit of each expert, nothing is compensated or
repaired. The others are ``split-energy`` with 16 parts, all but one of the active ones shared, and the repair:
``uniform`` gives every block the same share, ``allocated`` the shares in ``split_smollm2.py``. ``trained`` is
``allocated``, whose blocks ``moeify train`` then teaches to do what the dense model does, on five novels without a
label; it is run where it is named, since it is minutes on a GPU and hours without.

``python -m bench.bench_split_smollm2 [cmoe|uniform|allocated|trained ...] [--tokens N] [--steps N] [--json]``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import moeify
from bench.bench_memory import prepare
from bench.split_data import fit_text, test_text, train_text
from bench.split_report import Bar, finish
from bench.split_smollm2 import RECIPES
from moeify.api.convert import convert_file
from moeify.api.quality_report import QualityReport
from moeify.ir.report import Report

SEQUENCE, BATCH, TEST_TOKENS = 512, 4, 8192
BARS = {"3/4": 1.03, "1/2": 1.15}
MINUTES = 10.0
TRAINED, BASE = "trained", "allocated"


def measure(
    folder: Path, names: list[str], shares: list[str], tokens: int, told: dict[str, Any]
) -> list[dict[str, Any]]:
    """``told`` are the options of the training."""
    import pretrained

    prepare("smollm2", folder)
    cut = {"tokenizer": pretrained.smollm2(), "sequence": SEQUENCE, "batch": BATCH}
    for name, text in (("fit", fit_text()), ("train", train_text()), ("test", test_text())):
        (folder / f"{name}.txt").write_text(text)
    started = time.perf_counter()
    moeify.profile(folder / "model", folder / "fit.txt", tokens=tokens, output=folder / "profile", **cut)
    profiled = time.perf_counter() - started
    rows = []
    for share in shares:
        for name in names:
            recipe = RECIPES[BASE if name == TRAINED else name, share]
            made = folder / "moe.pt2"
            report = convert_file(folder / "model", made, recipe, profile=folder / "profile")
            training: dict[str, Any] = {}
            if name == TRAINED:
                made, training = _train(folder, **cut, **told)
            found = moeify.quality(folder / "model", made, folder / "test.txt", tokens=TEST_TOKENS, **cut)
            rows.append({"share": share, "recipe": name, **_figures(report, found, profiled), **training})
    return rows


def _train(folder: Path, *, tokenizer: Path, sequence: int, batch: int, **told: Any) -> tuple[Path, dict[str, Any]]:
    """The model trained to the dense one, and what that took. The last pieces of the text are held out."""
    output = folder / "trained.pt2"
    report = moeify.train(
        folder / "moe.pt2", folder / "train.txt", output, teacher=folder / "model", tokenizer=str(tokenizer),
        sequence=sequence, **told,
    )  # fmt: skip
    for one in report.held_out:
        (against,) = one.against_teacher
        tokens = one.step * report.tokens_per_step
        print(
            f"{tokens:>9} tokens: {against.perplexity_ratio:.4f} over dense on held-out training text", file=sys.stderr
        )
    return output, {
        "trained on": report.run.steps * report.tokens_per_step,
        "training, s": round(sum(report.run.seconds), 1),
    }


def _figures(report: Report, found: QualityReport, profiled: float) -> dict[str, Any]:
    (output,) = found.outputs
    work = [sum(getattr(b, f"flops_per_token_{when}") for b in report.blocks) for when in ("before", "after")]
    return {
        "blocks": sum(block.converted for block in report.blocks),
        "FFN FLOPs": round(work[1] / work[0], 3),
        "dense perplexity": round(output.dense_perplexity, 2),
        "perplexity": round(output.perplexity, 2),
        "ratio": round(output.perplexity_ratio, 3),
        "KL, nats": round(output.divergence, 3),
        "agreement": round(output.agreement, 3),
        "seconds": round(profiled + report.seconds, 1),
    }


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    found = []
    for share, most in BARS.items():
        ratios = {row["recipe"]: row["ratio"] for row in rows if row["share"] == share}
        best = min((ratio for name, ratio in ratios.items() if name != "cmoe"), default=None)
        if best is None:
            continue
        found.append(Bar(f"perplexity over dense, {share} active", best, most))
        if "cmoe" in ratios:
            found.append(Bar(f"the same, against CMoE, {share} active", best, ratios["cmoe"]))
    slowest = max(row["seconds"] for row in rows)
    return [*found, Bar("minutes of the slowest conversion", round(slowest / 60, 1), MINUTES)]


def main() -> int:
    untrained = list(dict.fromkeys(name for name, _ in RECIPES))
    names = [*untrained, TRAINED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help=f"which of {', '.join(names)}; all but the last when none"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that is fitted to (default 8192)")
    parser.add_argument("--share", choices=list(BARS), action="append", help="of the hidden units (default both)")
    parser.add_argument("--steps", type=int, default=800, help="of training, of 8 pieces each (default 800)")
    parser.add_argument("--rate", type=float, default=3e-4, help="of training (default 3e-4)")
    parser.add_argument("--only", default="ffn", help="what is trained, as for moeify train (default ffn)")
    parser.add_argument("--device", help="where it is trained (default a GPU if there is one)")
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if unknown := set(options.recipes) - set(names):
        parser.error(f"there is no recipe {unknown.pop()!r}: choose of {', '.join(names)}")
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    told = {"steps": options.steps, "lr": options.rate, "only": options.only, "device": options.device,
            "eval_every": max(1, options.steps // 4), "test_examples": 16,
            "save_every": options.steps}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.recipes or untrained, options.share or list(BARS), options.tokens, told)
    title = f"SmolLM2-135M, fitted to {options.tokens} tokens, tested on {TEST_TOKENS}, {options.threads} threads"
    return finish(title, rows, bars(rows), seconds=time.perf_counter() - started, as_json=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
