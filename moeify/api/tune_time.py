"""How fast an allocation is: expected of every one, measured of those that are converted."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moeify.api import work
from moeify.api.bench import PACKAGES
from moeify.api.quality_runs import Record
from moeify.backends.onnxruntime.cost import MEASURED
from moeify.ir.block import Block
from moeify.ir.program import Program

_DENSE = "dense"


def can_measure() -> bool:
    """Whether ONNX Runtime and what exports to it are installed."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


@dataclass(frozen=True)
class Around:
    """The model around its blocks, for one batch: ``rows`` of each call by anchor, and seconds of all else."""

    rows: dict[str, list[int]]
    seconds: float


def around(program: Program, record: Record, blocks: Sequence[Block], threads: int) -> Around:
    """``record`` is of the dense program on one batch; the rest is a roofline of its FLOPs and of the bytes of its
    weights, with the rates of ``onnxruntime.cost``.
    """
    rows: dict[str, list[int]] = {}
    for (anchor, _), value in sorted(record.blocks.items()):
        rows.setdefault(anchor, []).append(len(value))
    _, whole = work.observe(program, record.inputs)
    flops = sum(block.flops_per_token * sum(rows[block.anchor]) for block in blocks)
    weights = {ref.parameter for block in blocks for ref in block.weights.values()}
    size = sum(program.parameter(name).numel() * program.parameter(name).element_size() for name in weights)
    arithmetic = max(0.0, whole.flops - flops) / (MEASURED.flops_per_thread * threads)
    return Around(rows, max(arithmetic, max(0.0, whole.bytes - size) / MEASURED.bandwidth))


class Clock:
    """Times converted programs against the dense one in ONNX Runtime, in turn, on the same inputs."""

    def __init__(self, dense: Program, inputs: Sequence[torch.Tensor], threads: int | None) -> None:
        """Raises NotExportable for a program that ONNX cannot express."""
        from moeify.backends.onnxruntime import candidates, measure

        self._inputs = tuple(inputs)
        model = candidates.dense(dense)
        self._sessions: Any = measure.Sessions(threads)
        self._dense = candidates.Runner({_DENSE: model}, self._sessions)

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self._sessions.__exit__()

    def ratio(self, program: Program) -> float:
        """Time of the converted program over the dense one's, by its fastest lowering: the median over rounds."""
        from moeify.backends.onnxruntime import candidates, measure

        models, _ = candidates.lowered(program)
        runner = candidates.Runner(models, self._sessions)
        calls: dict[str, Any] = {_DENSE: lambda: self._dense.call(_DENSE, self._inputs)}
        for name in models:
            calls[name] = lambda name=name: runner.call(name, self._inputs)
        taken = measure.interleaved(calls)
        best = min(models, key=lambda name: statistics.median(taken[name]))
        return measure.ratio(taken, best, _DENSE)
