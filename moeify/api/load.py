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
from moeify.errors import BadRecipe, UnreadableFile
from moeify.frontend import read_pt2
from moeify.ir.modes import TrainableGraph
from moeify.ir.program import InputSpec, Program
from moeify.ir.recipe import Recipe
from moeify.ir.report import Report
from moeify.training.watch import observe_if_asked


def load(path: str | Path, *, factory: str | None = None, allow: Sequence[str] = ()) -> nn.Module:
    """Open ``OUT.pt2`` (graph form) or a checkpoint folder (module form) as a trainable nn.Module, in eval mode.

    It is observed (``moeify.observe``) where its recipe names router losses. ``factory`` builds the dense skeleton of a
    folder whose model is not a transformers class. Nothing in the file is executed. Raises an InputError.
    """
    path = Path(path)
    if path.is_dir():
        model = surgery.load(path, factory=factory, allow=allow)
    else:
        model = graph_module(*read_graph(path))
    observe_if_asked(model)
    return model


def read_graph(path: Path) -> tuple[Program, dict[str, Any]]:
    """The Program and the moeify.json of a converted ``.pt2``."""
    exported, extra = read_pt2(path, extra=(METADATA,))
    if not extra.get(METADATA):
        raise UnreadableFile(
            f"{path} is a torch.export archive that moeify did not write",
            hint="convert it first: moeify convert",
        )
    try:
        metadata = json.loads(extra[METADATA])
        version = metadata["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error
    if version != FORMAT:
        raise UnreadableFile(
            f"{path} has format {version!r} and this moeify reads format {FORMAT}",
            hint="open it with the version that wrote it, named in moeify.json",
        )
    args, _ = exported.example_inputs or ((), {})
    try:
        specs = tuple(InputSpec(s["name"], _dtype(s["dtype"]), tuple(s["shape"])) for s in metadata["inputs"])
        program = Program(exported.module(check_guards=False), specs, tuple(args))
        program.recipe = Recipe.from_dict(metadata["recipe"])
        program.provenance["attention_dropout"] = tuple(metadata["attention_dropout"])
        Report.from_dict(metadata["report"])  # what it cannot read is damage, and is better said now
    except (BadRecipe, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error
    return program, metadata


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found


def _damaged(path: Path, error: Exception) -> UnreadableFile:
    return UnreadableFile(f"the {METADATA} in {path} is damaged: {type(error).__name__}: {error}")


def trainable(program: Program, report: Report) -> nn.Module:
    """A converted Program as a module with a train/eval switch."""
    return graph_module(program, describe(program, report))


def graph_module(program: Program, metadata: dict[str, Any]) -> nn.Module:
    """What ``read_graph`` gives, as ``load`` gives it, not observed."""
    module = TrainableGraph(program.graph_module, program.graph)
    module.attention_dropout = tuple(metadata["attention_dropout"])
    module.moeify_report = Report.from_dict(metadata["report"])  # type: ignore[assignment]
    return module.eval()
