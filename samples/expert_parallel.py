"""SmolLM2-135M-Instruct with 8 experts in every second block on 4 ranks: the same perplexity as one process, 20 steps
of training, a power failure, and on with 2 ranks from the last checkpoint.

The text is Austen's Emma where its package is (see austen.py), else this repository's README. ``--small`` takes fewer
of everything, and the first four of the 30 layers, which are no language model any more: most of the time goes to
reading the model in each of the ten processes. Ranks are processes over gloo; torchrun starts the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from austen import novel
from pretrained import OUT, smollm2

import moeify

FOLDER = OUT / "expert-parallel"
TOKENIZER = FOLDER / "tokenizer"


def converted(experts: int, layers: int | None) -> Path:
    """The model, or its first layers, as a ``.pt2``, by way of the folder that ``moeify convert`` reads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense, output = FOLDER / "dense", FOLDER / "smollm2-moe.pt2"
    source = smollm2()
    # From the GGUF file each process would take seconds over it.
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(TOKENIZER)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    config.use_cache = False  # a training step has no use for it
    if layers is not None:
        config.num_hidden_layers, config.layer_types = layers, None
    plain = type(model)(config)  # transformers does not save what it has read from GGUF
    plain.load_state_dict(model.state_dict(), strict=layers is None)
    plain.save_pretrained(dense)
    del model, plain
    report = moeify.convert_file(dense, output, moeify.Recipe(experts=experts, top_k=2, blocks="every:2"))
    done = [block for block in report.blocks if block.converted]
    print(f"{len(done)} of {len(report.blocks)} blocks into {experts} experts, top-2: ", end="")
    print(f"{report.parameters_before / 1e6:.0f}M -> {report.parameters_after / 1e6:.0f}M parameters")
    shutil.rmtree(dense)
    return output


def start(ranks: int, *words: object) -> list[subprocess.Popen[str]]:
    """What ``torchrun --nproc-per-node N -m moeify.run`` starts, each rank in reach of a kill."""
    command = [sys.executable, "-m", "moeify.run", *map(str, words), "--json"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = []
    for rank in range(ranks):
        told = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        told["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // ranks)
        environment = {**os.environ, **{name: str(value) for name, value in told.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    return started


def run(ranks: int, *words: object) -> dict[str, Any]:
    """What the first rank answers."""
    ended = [(*one.communicate(), one.returncode) for one in start(ranks, *words)]
    if any(code for *_, code in ended):
        raise SystemExit("\n".join(err for _, err, _ in ended))
    return json.loads(ended[0][0])


def fails_after(ranks: int, checkpoint: Path, *words: object) -> None:
    """Kill every rank as soon as the checkpoint is there."""
    started = start(ranks, *words)
    while not checkpoint.exists():
        if any(one.poll() is not None for one in started):
            raise SystemExit("\n".join(one.communicate()[1] for one in started))
        time.sleep(0.1)
    for one in started:
        one.kill()
    for one in started:
        one.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="2 ranks, 4 layers, 4 experts, a page, 2 steps")
    small = parser.parse_args().small
    ranks, experts, layers = (2, 4, 4) if small else (4, 8, None)
    sequence, pieces, steps = (32, 8, 2) if small else (128, 24, 20)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    text = novel() or (OUT.parent / "README.md").read_text()
    book = FOLDER / "book.txt"
    book.write_text(text[: 6 * sequence * pieces])  # a token has about four letters
    model = converted(experts, layers)
    words = [model, "--data", book, "--tokenizer", TOKENIZER, "--sequence", sequence, "--batch", 4]

    alone, together = run(1, *words), run(ranks, *words)
    for name, said in (("one process", alone), (f"{ranks} ranks", together)):
        print(f"perplexity {said['perplexity']:.5f} on {said['terms']} tokens, {name}, {said['seconds']:.0f} s")
    moved = abs(together["perplexity"] / alone["perplexity"] - 1)
    if moved > 1e-4:
        raise SystemExit(f"the perplexity moved by {moved:.1e}")

    kept = FOLDER / "checkpoints"
    words += ["--lr", 2e-5, "--checkpoints", kept, "--every", steps // 2, "--resume"]
    fails_after(ranks, kept / f"step-{steps:08d}", *words, "--steps", 100 * steps)
    print(f"{ranks} ranks killed after step {steps}")
    more = run(2, *words, "--steps", 2 * steps)
    print(f"2 ranks go on with step {more['first_step']}: losses {more['losses'][0]:.4f} to {more['losses'][-1]:.4f}")
    trained = run(1, *words)
    print(f"perplexity after {2 * steps} steps {trained['perplexity']:.5f}, before {alone['perplexity']:.5f}")
    if more["first_step"] != steps + 1 or not trained["perplexity"] < alone["perplexity"]:
        raise SystemExit("the run did not go on where it had stopped")
    print("the same on any number of ranks, and it goes on after a failure")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
