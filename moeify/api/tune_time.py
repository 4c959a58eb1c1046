"""How fast an allocation is: expected of every one, measured of those that are converted."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moeify.api import work
from moeify.api.bench import PACKAGES
from moeify.api.export import TOLERANCE
from moeify.api.quality_runs import Record
from moeify.backends.onnxruntime.cost import KERNEL, MEASURED, SPLIT
from moeify.ir.block import Block
from moeify.ir.program import Program

_DENSE, _CONVERTED = "dense", "converted"


def can_measure() -> bool:
    """Whether ONNX Runtime and what exports to it are installed."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


@dataclass(frozen=True)
class Around:
    """The model around its blocks, for one batch: ``rows`` of each call by anchor, what the experts of a block may be
    lowered to, and seconds of all else.
    """

    rows: dict[str, list[int]]
    lowerings: dict[str, tuple[str, ...]]
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
    lowerings = {block.anchor: _lowerings(block) for block in blocks}
    return Around(rows, lowerings, max(arithmetic, max(0.0, whole.bytes - size) / MEASURED.bandwidth))


def _lowerings(block: Block) -> tuple[str, ...]:
    """Those that an export on this machine weighs for most blocks. ``com.microsoft.MoE`` is left out: it is seldom
    chosen, and whether it fits is known of an exported block only.
    """
    if not can_measure():
        return (SPLIT,)
    from moeify.backends.onnxruntime import kernel_library, kernel_pack

    fused = kernel_library.is_built() and block.activation in kernel_pack.ACTIVATIONS
    return (SPLIT, KERNEL) if fused else (SPLIT,)


@dataclass(frozen=True)
class Timed:
    """``ratio`` is the converted program's time over the dense one's, ``lowerings`` what its blocks were lowered to."""

    ratio: float
    lowerings: tuple[str, ...]


class Clock:
    """Times converted programs against the dense one in ONNX Runtime, in turn, on the same inputs.

    What is timed is what ``moeify export --tokens TOKENS --threads THREADS`` makes on this machine: each block is
    lowered as the export's own choice says, within its own tolerance.
    """

    def __init__(self, dense: Program, inputs: Sequence[torch.Tensor], tokens: int, threads: int | None) -> None:
        """Raises NotExportable for a program that ONNX cannot express."""
        from moeify.backends.onnxruntime import candidates, measure
        from moeify.backends.onnxruntime.backend import OnnxRuntime

        backend = OnnxRuntime(tokens=tokens, threads=threads or 0)
        self._choose = backend.chooser(TOLERANCE[backend.precision])
        self._inputs = tuple(inputs)
        model = candidates.dense(dense)
        self._sessions: Any = measure.Sessions(threads)
        self._dense = candidates.Runner({_DENSE: model}, self._sessions)

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self._sessions.__exit__()

    def time(self, program: Program) -> Timed:
        """The median over rounds. Raises NotExportable."""
        from moeify.backends.onnxruntime import candidates, lowering, measure

        lowered = lowering.lower(lowering.neutral(program), self._choose, candidates.TABLE)
        runner = candidates.Runner({_CONVERTED: lowered.model}, self._sessions)
        taken = measure.interleaved(
            {
                _DENSE: lambda: self._dense.call(_DENSE, self._inputs),
                _CONVERTED: lambda: runner.call(_CONVERTED, self._inputs),
            }
        )
        lowerings = dict.fromkeys(choice.lowering for choice in lowered.choices)
        return Timed(measure.ratio(taken, _CONVERTED, _DENSE), tuple(lowerings))
