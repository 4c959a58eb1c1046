"""Every sample runs as its README line says, on the real model it names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_image_experiments import write_idx

SAMPLES = Path(__file__).parent.parent / "samples"

EXPECT = {
    "minilm.py": ["6 of 6", "similarities unchanged"],
    "serve_minilm.py": [
        "serving minilm-moe.onnx",
        # What the dense model says, to four digits; see minilm.py.
        "0.6861  A man is playing",
        "-0.0922  A man is playing",
        "0.5448  The cat sleeps",
        "imported here: no torch, no transformers, no moeify",
    ],
    "prompt_guard.py": ["relu2, 16 experts of 512", "8 of 8 verdicts right and unchanged", "verdicts move by"],
    "smollm2.py": ["LlamaForCausalLM: 30 blocks found, 15 converted", "generation unchanged"],
    "vit.py": ["left dense, not selected by the recipe", "five training steps"],
    "lstm.py": ["relu, 8 experts", "20 training steps"],
    "whisper.py": ["gelu, 4 experts", "transcript tokens after"],
    "expert_parallel.py": ["2 of 4 blocks", "2 ranks go on with step 3", "it goes on after a failure"],
    # Experiments: small, a few steps say nothing about the question, and the verdict is that of any run.
    "upcycle_gpt.py": ["| dense, continued | 20 |", "| copy | 13 |", "| granular, two shards |", "\ncopy: 0."],
    "compare_routers.py": ["| none, dense |", "| relu | l1{active=2} |", "| rl | reinforce, switch |", "| base |"],
    "sparsely_gated_lstm.py": ["| dense |", "| 0 | 0 |", "| 0.1 | 0.1 |", "CV(importance)"],
    "mnist_gates.py": ["| mnist | soft | none |", "| fashion-mnist | attentive, distilled | importance + similarity |"],
    "calibration.py": ["| dense, continued | 1.0000 |", "| experts, top-1 | 1.0000 |", "| experts, top-2 | 1.0000 |"],
}
EXPERIMENT = ["--small", "--markdown"]
ARGUMENTS = {
    "smollm2.py": ["--length", "8"],
    "expert_parallel.py": ["--small"],
    "upcycle_gpt.py": EXPERIMENT,
    "compare_routers.py": EXPERIMENT,
    "sparsely_gated_lstm.py": EXPERIMENT,
    "mnist_gates.py": [*EXPERIMENT, "--data", "IMAGES"],
    "calibration.py": [*EXPERIMENT, "--data", "IMAGES"],
}
# What samples share.
NO_SAMPLES = {"austen.py", "corpus.py", "experiment.py", "images.py", "language_model.py", "pretrained.py"}


def test_every_sample_is_listed() -> None:
    assert set(EXPECT) == {p.name for p in SAMPLES.glob("*.py")} - NO_SAMPLES


@pytest.mark.parametrize("name", EXPECT)
def test_sample(name: str, tmp_path: Path) -> None:
    arguments = ARGUMENTS.get(name, [])
    if "IMAGES" in arguments:  # drawn at random: the real ones are not among what `make setup` installs
        for kind in ("mnist", "fashion-mnist"):
            write_idx(tmp_path / kind)
        arguments = [str(tmp_path) if word == "IMAGES" else word for word in arguments]
    command = [sys.executable, str(SAMPLES / name), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in EXPECT[name]:
        assert text in done.stdout, done.stdout
