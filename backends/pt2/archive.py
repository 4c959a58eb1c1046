"""Writes a Program as a ``.pt2``: torch.export re-exports the rewritten graph, which is also its shape check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from moeify.backends.base import Backend
from moeify.backends.writing import atomically
from moeify.ir.modes import set_training
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
        "jitter_like": _KEPT,
        "normal_like": _KEPT,
    }
    NEVER: ClassVar[Mapping[str, str]] = {"ffn": "clean-up turns every dense block back into ATen operators"}

    def write(self, program: Program, report: Report, path: Path) -> None:
        """Raises OutputNotWritten; what was at ``path`` before is then untouched."""
        self.check(program)
        exported = export(program)
        with atomically(path) as temporary:
            torch.export.save(exported, temporary, extra_files={METADATA: json.dumps(describe(program, report))})


def export(program: Program) -> torch.export.ExportedProgram:
    """The program as an ExportedProgram in eval mode, dynamic where its inputs are."""
    set_training(program.graph_module, False)
    dynamic = tuple(
        {dim: torch.export.Dim.AUTO for dim, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in program.inputs
    )
    return torch.export.export(program.graph_module, program.example, dynamic_shapes=dynamic, strict=False)


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
