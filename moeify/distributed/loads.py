"""Rows that each expert gets, counted while the program runs; and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import fx

from moeify.backends.calls import find_calls
from moeify.errors import UnreadableFile
from moeify.ir.program import Program

Loads = dict[str, list[float]]  # Block.anchor -> rows of each expert; all calls of a block together


class _Counting(fx.Interpreter):
    """Adds up how often each expert is chosen."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self._blocks = {call.experts: call.block for call in find_calls(program.graph)}
        self.rows = {
            block: torch.zeros(program.parameter(f"{block}.experts.up").shape[0], dtype=torch.int64)
            for block in self._blocks.values()
        }

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        block = self._blocks.get(n.name)
        if block is not None:
            assert isinstance(value, torch.Tensor)
            rows = self.rows[block]
            # Slots without an expert hold the number after the last.
            rows += torch.bincount(value.flatten().cpu(), minlength=len(rows))[: len(rows)]
        return value


def measure(program: Program, batches: Iterable[Sequence[torch.Tensor]]) -> Loads:
    """Run the program on every batch and count."""
    if program.pending:
        program.materialise()
    counting = _Counting(program)
    with torch.no_grad():
        for batch in batches:
            counting.run(*batch)
    return {block: rows.tolist() for block, rows in counting.rows.items()}


def read(path: str | Path) -> Loads:
    """A JSON file, ``{"loads": {anchor: [rows of expert 0, ...]}}``. Raises UnreadableFile."""
    try:
        found = json.loads(Path(path).read_text())["loads"]
        loads = {str(block): [float(value) for value in rows] for block, rows in found.items()}
        if any(not rows or min(rows) < 0 or not sum(rows) < float("inf") for rows in loads.values()):
            raise ValueError("rows must be finite numbers of at least 0")
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableFile(
            f"{path} is not a file of loads: {error}", hint='write {"loads": {"encoder.layer.0": [120, 80, ...]}}'
        ) from error
    return loads
