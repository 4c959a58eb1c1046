"""Writes a Program as a ``.pt2``: torch.export re-exports the rewritten graph, which is also its shape check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from moeify.backends.base import Backend
from moeify.backends.exporting import export
from moeify.backends.pt2.unfailing import unfailing
from moeify.backends.writing import atomically
from moeify.ir.program import Program
from moeify.ir.report import Report

FORMAT = 1
METADATA = "moeify.json"
_KEPT = "kept as an operator; `import moeify` before torch.export.load"


@dataclass(frozen=True)
class Pt2(Backend):
    """torch.export archive with moeify.json in its extra files; runs wherever torch and moeify do."""

    name = "pt2"
    LOWER: ClassVar[Mapping[str, str]] = {
        "permute": _KEPT,
        "unpermute": _KEPT,
        "grouped_linear": _KEPT,
        "experts": _KEPT,
        "dispatch_ffn": _KEPT,
        "transpose_groups": _KEPT,
        "local_counts": _KEPT,
        "pad_groups": _KEPT,
        "unpad_groups": _KEPT,
        "all_to_all_rows": _KEPT,
        "all_to_all_even": _KEPT,
        "jitter_like": _KEPT,
        "normal_like": _KEPT,
        "gumbel_like": _KEPT,
        "uniform_like": _KEPT,
        "balanced_assignment": _KEPT,
        "sinkhorn": _KEPT,
    }
    NEVER: ClassVar[Mapping[str, str]] = {"ffn": "clean-up turns every dense block back into ATen operators"}

    def write(self, program: Program, report: Report, path: Path) -> None:
        """Atomically. Raises OutputNotWritten; what was at ``path`` before is then untouched."""
        self.check(program)
        exported = export(program)
        with atomically(path) as temporary, unfailing(temporary) as file:
            torch.export.save(exported, file, extra_files={METADATA: json.dumps(describe(program, report))})


def describe(program: Program, report: Report) -> dict[str, Any]:
    """The content of moeify.json."""
    return {
        "format": FORMAT,
        "form": "graph",
        "inputs": [
            {"name": s.name, "dtype": str(s.dtype).removeprefix("torch."), "shape": list(s.shape)}
            for s in program.inputs
        ],
        "recipe": program.recipe.to_dict(),
        "attention_dropout": program.provenance.get("attention_dropout", []),
        "report": report.to_dict(),
    }
