"""Every sample runs as its README line says, on the real model it names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
}
ARGUMENTS = {"smollm2.py": ["--length", "8"], "expert_parallel.py": ["--small"]}
NO_SAMPLES = {"austen.py", "pretrained.py"}


def test_every_sample_is_listed() -> None:
    assert set(EXPECT) == {p.name for p in SAMPLES.glob("*.py")} - NO_SAMPLES


@pytest.mark.parametrize("name", EXPECT)
def test_sample(name: str) -> None:
    command = [sys.executable, str(SAMPLES / name), *ARGUMENTS.get(name, [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in EXPECT[name]:
        assert text in done.stdout, done.stdout
