"""A Program as the torch graph that is imported into Relax, and what the compiled function takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from moeify.backends.calls import Call, find_calls
from moeify.backends.exporting import drop_router_noise, export, rename_symbols
from moeify.backends.tvm.types import dtype_name
from moeify.ir.no_expert import fill_slots
from moeify.ir.program import InputSpec, Program

_ENDLESS = 2**31  # torch writes "no bound" as the largest int64 or as infinity


@dataclass(frozen=True)
class Source:
    """The unlifted torch graph of a program, its calls, and its inputs.

    ``ranges`` are the bounds of dynamic dimensions by torch's symbol, (smallest, largest or None).
    """

    module: fx.GraphModule
    calls: list[Call]
    inputs: tuple[InputSpec, ...]
    ranges: dict[str, tuple[int, int | None]]


def source(program: Program) -> Source:
    """Raises NotExportable."""
    still = program.clone()
    drop_router_noise(still)
    fill_slots(still)
    exported = export(still)
    module = exported.module(check_guards=False)
    return Source(module, find_calls(module.graph), program.inputs, _ranges(exported))


def _ranges(exported: torch.export.ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """torch's constraints. A lower bound of 2 only says that the example was larger than 1: 0 and 1 run too."""
    found = {}
    for symbol, span in exported.range_constraints.items():
        lower, upper = span.lower, span.upper
        found[str(symbol)] = (
            int(lower) if lower > 2 else 0,
            int(upper) if upper.is_Integer and upper < _ENDLESS else None,
        )
    return found


def ranges_json(origin: Source) -> dict[str, list[int | None]]:
    """The bounds of the dimensions that have any, by name."""
    names = _symbols(origin)
    bounds: dict[str, list[int | None]] = {}
    for symbol, (lower, upper) in origin.ranges.items():
        if symbol not in names or (lower, upper) == (0, None):
            continue
        least, most = bounds.get(names[symbol], [0, None])  # inputs may share a name and not the symbol
        largest = [size for size in (most, upper) if size is not None]
        bounds[names[symbol]] = [max(least or 0, lower), min(largest, default=None)]
    return bounds


def inputs_json(inputs: Sequence[InputSpec]) -> list[dict[str, Any]]:
    """The inputs in order, for moeify.json: sizes are numbers, or names of dimensions that may differ."""
    return [{"name": i.name, "dtype": dtype_name(i.dtype), "shape": list(i.shape)} for i in inputs]


def outputs_json(origin: Source) -> list[dict[str, Any]]:
    """The outputs in order: as the inputs, a size that depends on more than one dimension as its formula."""
    names = _symbols(origin)
    (result,) = origin.module.graph.output_node().args
    values = [leaf.meta["val"] for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, fx.Node)]
    return [
        {"dtype": dtype_name(value.dtype), "shape": [_size(size, names) for size in value.shape]} for value in values
    ]


def _symbols(origin: Source) -> dict[str, str]:
    """torch's symbols -> the names of dimensions in the input specifications."""
    found: dict[str, str] = {}
    placeholders = origin.module.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, origin.inputs, strict=True):
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(name, str):
                found.setdefault(str(size), name)
    return found


def _size(size: Any, names: dict[str, str]) -> int | str:
    if is_concrete_int(size):
        return int(size)
    return rename_symbols(str(size), names)
