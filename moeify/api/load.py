"""Opening what moeify wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify import surgery
from moeify.backends.pt2.archive import FORMAT, METADATA, describe
from moeify.errors import UnreadableFile
from moeify.frontend import read_pt2
from moeify.ir.modes import TrainableGraph
from moeify.ir.program import InputSpec, Program
from moeify.ir.recipe import Recipe
from moeify.ir.report import Report


def load(path: str | Path, *, factory: str | None = None, allow: Sequence[str] = ()) -> nn.Module:
    """Open ``OUT.pt2`` (graph form) or a checkpoint folder (module form) as a trainable nn.Module, in eval mode.

    ``factory`` builds the dense skeleton of a folder whose model is not a transformers class. Nothing in the file is
    executed. Raises an InputError.
    """
    path = Path(path)
    if path.is_dir():
        return surgery.load(path, factory=factory, allow=allow)
    program, metadata = read_graph(path)
    return _trainable(program, metadata)


def read_graph(path: Path) -> tuple[Program, dict[str, Any]]:
    """The Program and the moeify.json of a converted ``.pt2``."""
    exported, extra = read_pt2(path, extra=(METADATA,))
    if not extra.get(METADATA):
        raise UnreadableFile(
            f"{path} is a torch.export archive that moeify did not write",
            hint="convert it first: moeify convert",
        )
    metadata = json.loads(extra[METADATA])
    if metadata.get("format") != FORMAT:
        raise UnreadableFile(
            f"{path} has format {metadata.get('format')!r} and this moeify reads format {FORMAT}",
            hint="open it with the version that wrote it, named in moeify.json",
        )
    specs = tuple(
        InputSpec(spec["name"], getattr(torch, spec["dtype"]), tuple(spec["shape"])) for spec in metadata["inputs"]
    )
    args, _ = exported.example_inputs or ((), {})
    program = Program(exported.module(check_guards=False), specs, tuple(args))
    program.recipe = Recipe.from_dict(metadata["recipe"])
    program.provenance["attention_dropout"] = metadata["attention_dropout"]
    return program, metadata


def trainable(program: Program, report: Report) -> nn.Module:
    """A converted Program as a module with a train/eval switch."""
    return _trainable(program, describe(program, report))


def _trainable(program: Program, metadata: dict[str, Any]) -> nn.Module:
    module = TrainableGraph(program.graph_module, program.graph)
    module.attention_dropout = tuple(metadata["attention_dropout"])
    module.moeify_report = Report.from_dict(metadata["report"])  # type: ignore[assignment]
    return module.eval()
