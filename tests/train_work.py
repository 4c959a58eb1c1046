"""Losses that ``tests/test_train.py`` gives by name: one that breaks, and one that is interrupted."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeify.ir.program import flat

stop_at = 0  # the call of ``is_interrupted`` in a step at which a SIGTERM comes; 0 for none
_calls = 0


def breaks_on_a_mark(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """NaN where the data says so."""
    return _loss(output) * torch.where(batch["mark"].any(), float("nan"), 1.0)


def is_interrupted(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    global _calls
    if torch.is_grad_enabled():
        _calls += 1
        if _calls == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    return _loss(output)


def _loss(output: Any) -> Tensor:
    return flat(output)[0].square().mean()
