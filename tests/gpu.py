"""What tests need that run only where a GPU is."""

from __future__ import annotations

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use here")
GPU = torch.device("cuda")


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The root of the mean squared difference, over that of ``expected``; both in float64 on the CPU."""
    value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
    return float((value - expected).square().mean().sqrt() / expected.square().mean().sqrt())
