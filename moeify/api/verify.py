"""Comparing any two programs on data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moeify.api.convert import captured
from moeify.api.load import load, read_graph
from moeify.api.progress import Silent
from moeify.backends.pt2.archive import METADATA
from moeify.data import tensors as data_files
from moeify.errors import BadInputSpec, UsageError
from moeify.frontend import capture, holds_metadata
from moeify.frontend.reasons import first_line
from moeify.ir.difference import relative_error, wide
from moeify.ir.program import Program, flat


@dataclass(frozen=True)
class OutputError:
    """How far one output of B is from A's: largest absolute and relative difference, and cosine of the flattened
    tensors, over what is finite in both.
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

    Inputs come from ``data``, or are the example inputs of ``a``; ``b`` gets them by name where it has the same names,
    else in order. ``tolerance`` is relative, 1e-5 unless given.
    """
    first = _program(a, inputs, factory, allow)
    batch = data_files.read(data, first.inputs) if data else first.example
    left = _outputs(first, batch, a)
    named = {spec.name: tensor for spec, tensor in zip(first.inputs, batch)}
    del first  # one model in memory at a time
    second = _program(b, inputs, factory, allow)
    same_names = named.keys() == {spec.name for spec in second.inputs}
    batch = data_files.fit(named if same_names else batch, second.inputs, f"the input of {a}, given to {b}")
    return compare(left, _outputs(second, batch, b), 1e-5 if tolerance is None else tolerance)


def _outputs(program: Program, batch: tuple[torch.Tensor, ...], path: str | Path) -> list[torch.Tensor]:
    try:
        return flat(program.run(*batch))
    except (RuntimeError, IndexError, ValueError) as error:
        raise BadInputSpec(f"{path} does not run on these inputs: {first_line(error)}") from error


def compare(left: list[torch.Tensor], right: list[torch.Tensor], tolerance: float) -> Comparison:
    """Raises UsageError when the two do not have outputs of the same number and shapes."""
    shapes = [[tuple(t.shape) for t in side] for side in (left, right)]
    if shapes[0] != shapes[1]:
        raise UsageError(f"the outputs cannot be compared: shapes {shapes[0]} against {shapes[1]}")
    errors = [_error(f"output {i}", x, y) for i, (x, y) in enumerate(zip(left, right))]
    worst = max((e.max_relative for e in errors), default=0.0)
    return Comparison(errors, worst, worst <= tolerance)


def _error(name: str, reference: torch.Tensor, value: torch.Tensor) -> OutputError:
    finite = reference.isfinite() & value.isfinite()  # relative_error says whether the rest is the same
    a, b = (wide(tensor[finite]).flatten() for tensor in (reference, value))
    max_abs = (a - b).abs().max().item() if a.numel() else 0.0
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item() if max_abs else 1.0
    return OutputError(name, max_abs, relative_error(value, reference), cosine)


def _program(path: str | Path, inputs: Sequence[str], factory: str | None, allow: Sequence[str]) -> Program:
    path = Path(path)
    if holds_metadata(path, METADATA):
        return read_graph(path)[0]
    if (path / METADATA).is_file():
        return capture(load(path, factory=factory, allow=allow), inputs or None)
    return captured(path, inputs, factory, allow, Silent())[0]
