"""The converted file again, with other weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.api.load import read_graph
from moeify.backends.pt2.archive import Pt2
from moeify.distributed.checkpoint_tensors import weights
from moeify.ir.program import Program
from moeify.ir.report import Report


def write_trained(
    model: Path,
    output: Path,
    note: str,
    fill: Callable[[Program], Any],
    router_losses: tuple[str, ...] | None = None,
) -> None:
    """``model`` as ``output`` with the weights that ``fill`` gives it, whole or not at all, and a note in its report.

    Raises OutputNotWritten and what ``fill`` raises.
    """
    program, metadata = read_graph(model)
    fill(program)
    report = Report.from_dict(metadata["report"])
    report.notes.append(note)
    if router_losses is not None:
        program.recipe = dataclasses.replace(program.recipe, router_losses=router_losses)
        report.recipe = {**report.recipe, "router_losses": list(router_losses)}
    Pt2().write(program, report, output)


def copy_weights(module: nn.Module, program: Program) -> None:
    """From a module that was made of the same program."""
    held = weights(module)
    with torch.no_grad():
        for name, value in weights(program.graph_module).items():
            value.copy_(held[name])
