"""Looking at a model file: what would be converted, or what was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeify.api import reporting
from moeify.api.convert import captured, check_names
from moeify.api.load import read_graph
from moeify.api.progress import Silent
from moeify.backends.pt2.archive import METADATA
from moeify.errors import UnreadableFile
from moeify.frontend import holds_metadata
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.ir.report import Report
from moeify.pipeline.default import FIND, REWRITE
from moeify.pipeline.runner import run


@dataclass
class Inspection:
    """``program`` is the (would-be) converted one, its new weights still on the meta device for a dense file;
    ``dense`` is the program before the rewrite, or None for a file that is converted already."""

    report: Report
    program: Program
    dense: Program | None


def inspect_file(
    model: str | Path,
    *,
    recipe: Recipe | None = None,
    inputs: Sequence[str] = (),
    factory: str | None = None,
    allow: Sequence[str] = (),
) -> Inspection:
    """What moeify sees in a file. Nothing is written, and no expert weight is computed."""
    path = Path(model)
    if (path / METADATA).is_file():
        raise UnreadableFile(
            f"{path} is a converted checkpoint folder",
            hint="inspect the .pt2, or read moeify.json in the folder",
        )
    if holds_metadata(path, METADATA):
        program, metadata = read_graph(path)
        return Inspection(Report.from_dict(metadata["report"]), program, None)
    check_names(recipe or Recipe())
    program, notes = captured(model, inputs, factory, allow, Silent())
    program.recipe = recipe or Recipe()
    run(program, FIND)
    report = reporting.describe(program, str(model))
    report.notes = notes + report.notes
    dense = program.clone()
    if program.converted():
        run(program, REWRITE)
        reporting.complete(report, program)
    return Inspection(report, program, dense)
