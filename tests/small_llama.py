"""A Llama of random weights, small enough for a test, as the folder that transformers would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


def saved(folder: Path, **sizes: Any) -> Path:
    """Two layers of 32 hidden units, if ``sizes``, fields of its config, do not say otherwise."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    usual = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**{**usual, **heads, "use_cache": False, **sizes})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
