"""Ranks on GPUs, exchanging over NCCL: as many as the machine has, four at most, against one process on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeify
from tests import small_llama
from tests.gpu import needs_gpu, relative

pytestmark = needs_gpu


def run(device: str, ranks: int, *words: object) -> dict:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", 29512]
    command = [str(word) for word in (*torchrun, "-m", "moeify.run", *words, "--json", "--device", device)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_the_runner_gives_the_numbers_of_the_cpu(tmp_path: Path) -> None:
    """Evaluation, three steps, a checkpoint, and three steps more."""
    dense = small_llama.saved(tmp_path / "dense", hidden_size=32, intermediate_size=48)
    recipe = moeify.Recipe(experts=4, top_k=2, router_losses=("switch",))
    moeify.convert_file(dense, tmp_path / "moe.pt2", recipe)
    ids = torch.randint(8, 128, (24, 16))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "data.safetensors")
    ranks = min(torch.cuda.device_count(), 4)
    said, weights = {}, {}
    for device, size in (("cpu", 1), ("cuda", ranks)):
        words = [tmp_path / "moe.pt2", "--data", tmp_path / "data.safetensors"]
        kept = [*words, "--lr", 1e-3, "--checkpoints", tmp_path / device, "--every", 3, "--resume"]
        evaluated = run(device, size, *words)
        first = run(device, size, *kept, "--steps", 3)
        more = run(device, size, *kept, "--steps", 6, "--write", tmp_path / f"{device}.safetensors")
        assert more["first_step"] == 4
        said[device] = [evaluated["perplexity"], *first["losses"], *more["losses"]]
        weights[device] = load_file(tmp_path / f"{device}.safetensors")
    # float32 in another order; AdamW's first steps divide a gradient by its own size, small ones included.
    assert said["cuda"] == pytest.approx(said["cpu"], rel=1e-4)
    assert {n: relative(weights["cuda"][n], w) < 1e-3 for n, w in weights["cpu"].items()} == dict.fromkeys(
        weights["cpu"], True
    )
