"""Comparing any two programs on data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moeify.api import data as data_files
from moeify.api.convert import captured
from moeify.api.load import load, read_graph
from moeify.api.progress import Silent
from moeify.backends.pt2.archive import METADATA
from moeify.errors import UsageError
from moeify.frontend import capture, holds_metadata
from moeify.ir.program import Program, flat
from moeify.verify.measure import relative_error


@dataclass(frozen=True)
class OutputError:
    """How far one output of B is from A's: largest absolute and relative difference, and cosine of the flattened
    tensors.
    """

    name: str
    max_abs: float
    max_relative: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    outputs: list[OutputError]
    max_relative_error: float
    agree: bool


def verify_files(
    a: str | Path,
    b: str | Path,
    *,
    data: str | Path | None = None,
    inputs: Sequence[str] = (),
    factory: str | None = None,
    allow: Sequence[str] = (),
    tolerance: float | None = None,
) -> Comparison:
    """Run two model files (dense or converted, any kind) on the same inputs and compare their outputs in order.

    Inputs come from ``data``, or are the example inputs of ``a``. ``tolerance`` is relative, 1e-5 unless given.
    """
    first = _program(a, inputs, factory, allow)
    specs = first.inputs
    batch = data_files.read(data, specs) if data else first.example
    left = flat(first.run(*batch))
    del first  # one model in memory at a time
    right = flat(_program(b, inputs, factory, allow).run(*batch))
    return compare(left, right, 1e-5 if tolerance is None else tolerance)


def compare(left: list[torch.Tensor], right: list[torch.Tensor], tolerance: float) -> Comparison:
    """Raises UsageError when the two do not have outputs of the same number and shapes."""
    shapes = [[tuple(t.shape) for t in side] for side in (left, right)]
    if shapes[0] != shapes[1]:
        raise UsageError(f"the outputs cannot be compared: shapes {shapes[0]} against {shapes[1]}")
    errors = [_error(f"output {i}", x, y) for i, (x, y) in enumerate(zip(left, right))]
    worst = max((e.max_relative for e in errors), default=0.0)
    return Comparison(errors, worst, worst <= tolerance)


def _error(name: str, reference: torch.Tensor, value: torch.Tensor) -> OutputError:
    a, b = reference.detach().double().flatten(), value.detach().double().flatten()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item() if a.numel() else 1.0
    max_abs = (a - b).abs().max().item() if a.numel() else 0.0
    return OutputError(name, max_abs, relative_error(value, reference), cosine)


def _program(path: str | Path, inputs: Sequence[str], factory: str | None, allow: Sequence[str]) -> Program:
    path = Path(path)
    if path.is_file() and holds_metadata(path, METADATA):
        return read_graph(path)[0]
    if (path / METADATA).is_file():
        return capture(load(path, factory=factory, allow=allow), inputs or None)
    return captured(path, inputs, factory, allow, Silent())[0]
