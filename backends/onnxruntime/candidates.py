"""A program in ONNX by every lowering that fits the CPU, and its dense twin: what benchmarks run side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch

from moeify.backends.deploy import Choice
from moeify.backends.exporting import export
from moeify.backends.onnxruntime import contrib, cost, kernel, kernel_build, kernel_library, split
from moeify.backends.onnxruntime.lowering import Neutral, lower, neutral
from moeify.backends.onnxruntime.measure import Sessions
from moeify.backends.onnxruntime.mixture import Mixture
from moeify.backends.onnxruntime.neutral import to_onnx
from moeify.ir.program import Program

TABLE = {cost.SPLIT: split.lower, cost.CONTRIB: contrib.lower, cost.KERNEL: kernel.lower}
_UNFIT: Mapping[str, Callable[[Mixture, str], str | None]] = {cost.CONTRIB: contrib.unfit, cost.KERNEL: kernel.unfit}


def lowered(program: Program) -> tuple[dict[str, ir.Model], dict[str, str]]:
    """``split``, and ``com.microsoft.MoE`` and ``kernel`` where a block can be one: models by lowering, and notes by
    lowering. ``kernel`` only where its library is built: without it the file computes what ``split`` does.

    Blocks that an operator cannot express are ``split`` beside those that it can; the note says which. Raises
    NotExportable.
    """
    source = neutral(program)
    models = {cost.SPLIT: lower(source, lambda mixture: Choice(cost.SPLIT, "asked for"), TABLE).model}
    notes: dict[str, str] = {}
    for name in (cost.CONTRIB, cost.KERNEL):
        if name == cost.KERNEL and not kernel_library.is_built():
            notes[name] = f"no {name} lowering: {kernel_build.reason()}"
            continue
        model, note = _where_it_fits(source, name)
        if model is not None:
            models[name] = model
        if note is not None:
            notes[name] = note
    return models, notes


def _where_it_fits(source: Neutral, name: str) -> tuple[ir.Model | None, str | None]:
    """The model with every block that can be it, None without one; and which cannot, None without those."""
    reasons: list[str] = []
    fused = 0

    def choose(mixture: Mixture) -> Choice:
        nonlocal fused
        reason = _UNFIT[name](mixture, "cpu")
        if reason is not None:
            reasons.append(reason)
            return Choice(cost.SPLIT, reason)
        fused += 1
        return Choice(name, "it fits")

    model = lower(source, choose, TABLE).model
    note = None
    if fused < len(source.calls):
        reason = reasons[0] if reasons else "the activation has no name"
        note = f"{len(source.calls) - fused} of {len(source.calls)} blocks cannot be a {name}: {reason}"
    return (model if fused else None), note


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

    def kernels(self) -> dict[str, str]:
        """What computes the fused blocks of the models that have any, by name."""
        return {name: str(one.kernels) for name, one in self._sessions.items() if one.kernels is not None}
