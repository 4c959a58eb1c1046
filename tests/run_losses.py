"""Losses that tests give to the runner by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import moeify.run  # noqa: F401  (for the fork server that imports this)
from moeify.cli import run_summary  # noqa: F401
from moeify.distributed import runner_forward, training  # noqa: F401
from moeify.ir.program import flat


def half_of_squares(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """A mean over the examples, with labels that the model does not read."""
    return (flat(output)[0].mean((1, 2)) - batch["labels"]).square().mean() / 2


def breaks_on_a_mark(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """NaN where an example begins with token 7."""
    loss = flat(output)[0].square().mean()
    return loss * torch.where((batch["input_ids"][:, 0] == 7).any(), float("nan"), 1.0)


def many(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return flat(output)[0]
