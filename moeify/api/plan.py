"""What expert parallelism would cost a model file, and a converted one with its experts placed by measured loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moeify import frontend
from moeify.api import reporting
from moeify.api.convert import captured, check_names, require_blocks
from moeify.api.load import read_graph
from moeify.api.progress import Progress, Silent
from moeify.backends.pt2.archive import METADATA, Pt2
from moeify.data import tensors as data_files
from moeify.distributed import loads as load_files
from moeify.distributed.labels import GIVEN, MEASURED, Figure
from moeify.distributed.mixtures import mixtures, parameters_outside
from moeify.distributed.network import Machine
from moeify.distributed.placement import in_order, place, with_copies
from moeify.distributed.plan import Model, PlacedBlock, Plan, make_plan
from moeify.distributed.setting import Setting
from moeify.errors import UsageError
from moeify.frontend.hf_skeleton import read_skeleton
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.ir.report import Report
from moeify.passes.place_experts import KEY as PLACEMENT
from moeify.pipeline.default import FIND, REWRITE
from moeify.pipeline.runner import run


def plan_file(
    model: str | Path,
    setting: Setting,
    machine: Machine | None = None,
    *,
    recipe: Recipe | None = None,
    inputs: Sequence[str] = (),
    factory: str | None = None,
    allow: Sequence[str] = (),
    loads: str | Path | None = None,
    data: str | Path | None = None,
    training: bool = True,
    output: str | Path | None = None,
    extra: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """The plan of a converted ``.pt2``, or of a dense model as ``recipe`` would convert it.

    No expert weight is computed; of a Hugging Face folder config.json alone is read. Loads come from the file
    ``loads``, or are measured by running a converted model on ``data``. With ``output`` the model is written there
    with its experts placed by them for the ranks of the plan, ``extra`` copies on each. Raises what reading raises,
    UsageError, and what ``make_plan`` raises.
    """
    progress = progress or Silent()
    if loads and data:
        raise UsageError("loads are given and are to be measured too", hint="give --loads or --data, not both")
    if output and not loads and not data:
        raise UsageError("placing experts needs loads", hint="give --loads FILE, or --data FILE to measure them")
    if output or data:
        _require_converted(model)
    program, report, described, notes = _described(model, recipe, inputs, factory, allow, progress)
    if loads:
        setting = dataclasses.replace(setting, loads=load_files.read(loads), loads_source=GIVEN)
    if data:
        progress.stage(f"counting rows on {data}")
        counted = load_files.measure(program, [data_files.read(data, program.inputs)])
        setting = dataclasses.replace(setting, loads=counted, loads_source=MEASURED)
    progress.stage("planning")
    made = make_plan(described, setting, machine, training=training)
    made.notes = notes + made.notes
    if output:
        progress.stage(f"writing {output}")
        made.placed = _place(program, described, setting, made.expert_ranks, extra)
        report.passes += [{"text": h.text, "seconds": h.seconds, "lines": list(h.lines)} for h in program.history]
        Pt2().write(program, report, Path(output))
    return made


def _place(program: Program, described: Model, setting: Setting, ranks: int, extra: int) -> list[PlacedBlock]:
    """Put the experts of a converted program where the loads want them, in place."""
    placement, made = {}, []
    for mixture in described.mixtures:
        rows = setting.loads[mixture.anchor]  # make_plan has refused loads of another model
        found = with_copies(rows, ranks, extra) if extra else place(rows, ranks)
        placement[mixture.anchor] = found.order
        before, after = in_order(mixture.experts, ranks).imbalance(rows), found.imbalance(rows)
        source = setting.loads_source
        made.append(PlacedBlock(mixture.path, Figure(before, "", source), Figure(after, "", source)))
    program.provenance[PLACEMENT] = placement
    run(program, ["place-experts"])
    return made


def _described(
    model: str | Path,
    recipe: Recipe | None,
    inputs: Sequence[str],
    factory: str | None,
    allow: Sequence[str],
    progress: Progress,
) -> tuple[Program, Report, Model, list[str]]:
    if frontend.holds_metadata(model, METADATA):
        progress.stage(f"reading {model}")
        program, facts = read_graph(Path(model))
        report = Report.from_dict(facts["report"])
        notes: list[str] = []
        dense = report.parameters_before
    else:
        recipe = recipe or Recipe()
        check_names(recipe)
        program, notes = _captured(model, inputs, factory, allow, progress)
        program.recipe = recipe
        run(program, FIND)
        require_blocks(program)
        report = reporting.describe(program, str(model))
        dense = report.parameters_before
        run(program, REWRITE)
    found = mixtures(program, {block.anchor: block.path for block in report.blocks})
    outside, size = parameters_outside(program, found)
    return program, report, Model(str(model), tuple(found), outside, size, dense), notes


def _captured(
    model: str | Path, inputs: Sequence[str], factory: str | None, allow: Sequence[str], progress: Progress
) -> tuple[Program, list[str]]:
    if not (Path(model) / "config.json").is_file() or (Path(model) / METADATA).is_file():
        return captured(model, inputs, factory, allow, progress)
    progress.stage(f"building {model} without weights")
    return frontend.capture(read_skeleton(model), inputs or None), []


def _require_converted(model: str | Path) -> None:
    if not frontend.holds_metadata(model, METADATA):
        raise UsageError(f"{model} is not converted, and loads are those of a converted model", hint="convert it first")
