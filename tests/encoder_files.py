"""A file with a small encoder, which tests convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

SPEC = ["float32[batch=2,seq=4,16]"]


def dense_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a fixture: two layers, saved whole."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
    path = tmp_path_factory.mktemp("models") / "dense.pt"
    torch.save(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), path)
    return path
