"""Real pretrained models to TVM: all-MiniLM-L6-v2 and NanoGuard, copied and split, and SmolLM2-135M with every one
of its 30 blocks copied or split.

Bars: every block and the whole model within 1e-4 of the Program in float32, on real text; SmolLM2's next token equal on
ten prompts, and its greedy continuations. Compilation of each is timed: the bar of 3 minutes is for 12 layers.

``python -m bench.bench_tvm_real [minilm|nanoguard|smollm2 ...] [copied|split] [--json]``
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.bench_memory import ROOT, prepare

BAR, COMPILE_BAR = 1e-4, 180.0
LAYERS = 12  # that the bar of compilation is for
COPIED, SPLIT = ["--experts", "8"], ["--method", "granular", "--experts", "16", "--top-k", "4"]
TEXTS = [
    "It is a truth universally acknowledged, that a single man of good fortune must be in want of a wife.",
    "The cat sat on the mat.",
    "Gradient descent follows the slope of the loss.",
]
PROMPTS = [
    "The capital of France is", "Water boils at a temperature of", "def fibonacci(n):\n",
    "Once upon a time there was a", "The largest planet of the solar system is",
    "To make bread, first mix flour and", "My favourite colour is",
    "In 1969, the first man walked on the", "The opposite of hot is", "She opened the door and saw",
]  # fmt: skip
STEPS = 4


def minilm(folder: Path, form: list[str]) -> tuple[Path, dict[str, Any]]:
    from transformers import AutoTokenizer

    prepare("minilm", folder)
    _convert(folder / "model", folder / "moe.pt2", form)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return folder / "moe.pt2", dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


def nanoguard(folder: Path, form: list[str]) -> tuple[Path, dict[str, Any]]:
    import pretrained
    import prompt_guard

    spec = ["--input", "input_ids=int64[batch=2,seq=16]", "--input", "attention_mask=int64[batch=2,seq=16]{below=2}"]
    _convert(pretrained.nanoguard(), folder / "moe.pt2", ["--factory", "prompt_guard:build", *spec, *form])
    ids, mask = prompt_guard.tokens(list(prompt_guard.PROMPTS))
    return folder / "moe.pt2", {"input_ids": ids[:, :64], "attention_mask": mask[:, :64]}


def smollm2(folder: Path, form: list[str]) -> tuple[Path, dict[str, Any]]:
    prepare("smollm2", folder)
    _convert(folder / "model", folder / "moe.pt2", form)
    ids = _tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    return folder / "moe.pt2", {"input_ids": ids, "attention_mask": ids * 0 + 1}


def _convert(model: Path, output: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "moeify", "convert", str(model), "-o", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "samples", check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def _tokenizer() -> Any:
    import pretrained
    from transformers import AutoTokenizer

    path = pretrained.smollm2()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


CASES: list[tuple[str, str, Callable[[Path, list[str]], tuple[Path, dict[str, Any]]], list[str]]] = [
    ("minilm", "copied 8 top-2", minilm, COPIED),
    ("minilm", "split 16 top-4", minilm, SPLIT),
    ("nanoguard", "copied 8 top-2", nanoguard, COPIED),
    ("nanoguard", "split 16 top-4", nanoguard, SPLIT),
    ("smollm2", "copied 4 top-2", smollm2, ["--experts", "4"]),
    ("smollm2", "split 8 top-4", smollm2, ["--method", "granular", "--experts", "8", "--top-k", "4"]),
]


def run(name: str, form: str, make: Callable[..., tuple[Path, dict[str, Any]]], options: list[str]) -> dict[str, Any]:
    import numpy

    from moeify import export_file
    from moeify.backends.tvm.backend import Tvm

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        moe, inputs = make(folder, options)
        arrays = {key: value.numpy() for key, value in inputs.items()}
        start = time.perf_counter()
        numpy.savez(folder / "text.npz", **arrays)
        report = export_file(moe, folder / "tvm", Tvm(), data=folder / "text.npz")
        row = {
            "model": name, "form": form, "blocks": len(report.blocks), "tokens": report.tokens_verified,
            "block_error": max(block.relative_error or 0.0 for block in report.blocks),
            "model_error": report.model_relative_error, "rerouted": report.rerouted,
            "megabytes": round(report.bytes / 1e6), "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
        if name == "smollm2":
            row |= _continue(moe, folder / "tvm")
    return row


def _continue(moe: Path, library: Path) -> dict[str, Any]:
    """Greedy continuations by both. No key-value cache: the whole text is run again for every token."""
    import torch

    import moeify
    from moeify.backends.tvm import load

    program, compiled, tokenizer = moeify.load(moe), load(library), _tokenizer()
    first, all_equal, texts = 0, True, []
    for prompt in PROMPTS:
        start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        grown = []
        for step in (lambda ids: compiled.run(_inputs(ids))[0], lambda ids: _logits(program(**_inputs(ids)))):
            ids = start
            for _ in range(STEPS):
                with torch.no_grad():
                    ids = torch.cat([ids, step(ids)[:, -1:].argmax(-1)], 1)
            grown.append(ids)
        first += torch.equal(grown[0][:, : start.shape[1] + 1], grown[1][:, : start.shape[1] + 1])
        all_equal &= torch.equal(*grown)
        texts.append(tokenizer.decode(grown[0][0]))
    return {"next_tokens_equal": first, "continuations_equal": all_equal, "texts": texts}


def _inputs(ids: Any) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": ids * 0 + 1}


def _logits(output: Any) -> Any:
    return output["logits"] if isinstance(output, dict) else output


def held(row: dict[str, Any]) -> bool:
    good = max(row["block_error"], row["model_error"]) <= BAR
    good = good and (row["blocks"] > LAYERS or row["seconds"] <= COMPILE_BAR)
    return good and row.get("next_tokens_equal", len(PROMPTS)) == len(PROMPTS) and row.get("continuations_equal", True)


def chosen(words: list[str]) -> list[tuple[Any, ...]]:
    """The cases of the models and of the forms that are named; all where none is."""
    models, forms = {case[0] for case in CASES}, {case[1].split()[0] for case in CASES}
    unknown = sorted(set(words) - models - forms)
    if unknown:
        raise SystemExit(f"there is no model or form {unknown[0]!r}: {', '.join(sorted(models | forms))}")
    models, forms = models & set(words) or models, forms & set(words) or forms
    return [case for case in CASES if case[0] in models and case[1].split()[0] in forms]


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    sys.path.insert(0, str(ROOT / "samples"))
    rows = [run(*case) for case in chosen([word for word in sys.argv[1:] if not word.startswith("-")])]
    good = all(held(row) for row in rows)
    if "--json" in sys.argv:
        print(json.dumps({"rows": rows, "bar": BAR, "held": good}))
        return 0 if good else 1
    table = Table(title="Real models in TVM against the Program, float32")
    columns = ("model", "form", "blocks", "tokens", "block_error", "model_error", "megabytes", "seconds")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{row[c]:.1e}" if c.endswith("error") else str(row[c]) for c in columns))
    Console().print(table)
    for row in rows:
        for text in row.get("texts", []):
            print(f"  {text!r}")
        if "texts" in row:
            print(f"next tokens equal: {row['next_tokens_equal']} of {len(PROMPTS)}; {STEPS} greedy steps equal: "
                  f"{row['continuations_equal']}")  # fmt: skip
    print("held" if good else "MISSED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
