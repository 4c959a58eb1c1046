"""A program in ONNX by every lowering that fits the CPU, and its dense twin: what benchmarks run side by side."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from moeify.backends.deploy import Choice
from moeify.backends.exporting import export
from moeify.backends.onnxruntime import contrib, cost, split
from moeify.backends.onnxruntime.lowering import lower, neutral
from moeify.backends.onnxruntime.measure import Sessions
from moeify.backends.onnxruntime.mixture import Mixture
from moeify.backends.onnxruntime.neutral import to_onnx
from moeify.ir.program import Program

_TABLE = {cost.SPLIT: split.lower, cost.CONTRIB: contrib.lower}


def lowered(program: Program) -> tuple[dict[str, ir.Model], dict[str, str]]:
    """``split``, and ``com.microsoft.MoE`` where a block can be one: models by lowering, and notes by lowering.

    Blocks that the operator cannot express are ``split`` beside those that it can; the note says which. Raises
    NotExportable.
    """
    source = neutral(program)
    reasons: list[str] = []
    fused = 0

    def choose(mixture: Mixture) -> Choice:
        nonlocal fused
        reason = contrib.unfit(mixture, "cpu")
        if reason is not None:
            reasons.append(reason)
            return Choice(cost.SPLIT, reason)
        fused += 1
        return Choice(cost.CONTRIB, "it fits")

    models = {cost.SPLIT: lower(source, lambda mixture: Choice(cost.SPLIT, "asked for"), _TABLE).model}
    with_contrib = lower(source, choose, _TABLE).model
    notes: dict[str, str] = {}
    if fused:
        models[cost.CONTRIB] = with_contrib
    if fused < len(source.calls):
        reason = reasons[0] if reasons else "the activation has no name"
        kept = len(source.calls) - fused
        notes[cost.CONTRIB] = f"{kept} of {len(source.calls)} blocks cannot be a {cost.CONTRIB}: {reason}"
    return models, notes


def dense(twin: Program) -> ir.Model:
    """The dense twin, exported the same way. Raises NotExportable."""
    return to_onnx(export(twin), twin.inputs)


class Runner:
    """The sessions of several models on the CPU with one number of threads."""

    def __init__(self, models: dict[str, ir.Model], sessions: Sessions) -> None:
        self._sessions = {name: sessions.open(model) for name, model in models.items()}

    def call(self, name: str, inputs: tuple[torch.Tensor, ...]) -> Any:
        """Run one of them. Inputs come in the program's order; a dense model keeps all of them."""
        return self._sessions[name].run(inputs)
