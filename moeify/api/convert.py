"""Dense in, verified mixture of experts out."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify import frontend, surgery
from moeify.api import reporting
from moeify.api.dumps import Dumps, Show
from moeify.api.progress import Progress, Silent
from moeify.api.user_data import UserData
from moeify.backends.pt2.archive import METADATA, Pt2
from moeify.data.examples import Options
from moeify.errors import (
    BadInputSpec,
    NoBlocks,
    OutputNotWritten,
    UnreadableFile,
    UsageError,
    VerificationFailed,
)
from moeify.experts import METHODS
from moeify.fitting import stage
from moeify.frontend.reasons import first_line
from moeify.ir.profile import Profile
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.ir.report import Report
from moeify.nn.losses import LOSSES
from moeify.nn.routers import ROUTERS
from moeify.pipeline.default import FIND, REWRITE
from moeify.pipeline.runner import run
from moeify.training.watch import observe_if_asked
from moeify.verify.all_on import all_on_errors
from moeify.verify.measure import Recording, tolerance_for


def convert_file(
    model: str | Path,
    output: str | Path | None,
    recipe: Recipe,
    *,
    inputs: Sequence[str] = (),
    data: str | Path | None = None,
    options: Options | None = None,
    profile: str | Path | None = None,
    factory: str | None = None,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
    print_after: Sequence[str] = (),
    print_after_all: bool = False,
    dump_dir: str | Path | None = None,
    show: Show | None = None,
) -> Report:
    """``moeify convert``: read a model file, convert it by the recipe, verify, write ``output`` (a ``.pt2``).

    ``output`` None verifies and writes nothing. ``data`` are what methods that split learn from, and what is verified
    on; ``options`` say how they are read. ``profile`` is a file of ``moeify profile``, to learn from in their place.
    Raises a MoeifyError of the cause; nothing is written then.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    dumps = Dumps(show, print_after, print_after_all, Path(dump_dir) if dump_dir else None)
    check_names(recipe)
    given = UserData(data, profile, options or Options(seed=recipe.seed))
    given.check()
    if output is not None:
        check_output(Path(output), Path(model))
    program, notes = captured(model, inputs, factory, allow, progress)
    program.recipe = recipe
    report = rewrite(program, given, str(model), progress, dumps, Path(model))
    report.notes = notes + report.notes
    report.seconds = time.perf_counter() - started
    if output is not None:
        progress.stage(f"writing {output}")
        report.output = str(output)
        Pt2().write(program, report, Path(output))
    report.seconds = time.perf_counter() - started
    return report


def convert(
    model: nn.Module,
    recipe: Recipe | None = None,
    *,
    inputs: Sequence[str] | Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None = None,
    data: Any = None,
    tokenizer: str | Path | None = None,
    sequence: int | None = None,
    profile: Profile | str | Path | None = None,
    form: str = "module",
    **fields: Any,
) -> nn.Module:
    """Turn the FFN blocks of ``model`` into mixtures of experts.

    ``form="module"`` returns the same object with its FFN submodules replaced in place, so generate(), Trainer and
    hooks go on working; ``form="graph"`` returns a torch.fx graph of the whole model and leaves ``model`` alone.
    ``recipe`` or its fields as keywords (``experts=8, top_k=2, method="copy"``) say what to make. ``inputs`` are
    example tensors (by name or in order) or specs such as ``"input_ids=int64[batch=2,seq=16]"``; without them they
    are guessed. ``data`` replaces the example in verification and is what methods that split learn from: one batch as a
    tuple of tensors, or anything that ``moeify.profile`` takes; ``profile`` is what that returned, or its file. The
    result carries the ``Report`` as ``moeify_report``, and is observed (``moeify.observe``) where the recipe names
    router losses. Raises VerificationFailed before the model is touched.
    """
    if form not in ("module", "graph"):
        raise UsageError(f"there is no form {form!r}", hint="choose 'module' or 'graph'")
    if recipe is not None and fields:
        raise UsageError("give a recipe or its fields, not both")
    recipe = recipe if recipe is not None else Recipe(**fields)
    check_names(recipe)
    given = UserData(data, profile, Options(str(tokenizer) if tokenizer else None, sequence, seed=recipe.seed))
    given.check()
    started = time.perf_counter()
    program = frontend.capture(model, inputs)
    program.recipe = recipe
    report = rewrite(program, given, type(model).__name__, Silent(), Dumps())
    report.seconds = time.perf_counter() - started
    if form == "graph":
        from moeify.api.load import trainable

        result = trainable(program, report)
    else:
        result = surgery.apply(model, program)
        result.moeify_report = report  # type: ignore[assignment]
    observe_if_asked(result)
    return result


def check_names(recipe: Recipe) -> None:
    """Raises UnknownName or BadOption for a method, router or router loss that does not exist, before any work."""
    whole = {"method": recipe.method, "router": recipe.router, "router_losses": recipe.router_losses}
    for fields in (whole, *(fields for _, fields in recipe.overrides)):
        if "method" in fields:
            METHODS.parse(fields["method"])
        if fields.get("router"):
            ROUTERS.parse(fields["router"])
        for text in fields.get("router_losses", ()):
            LOSSES.parse(text)


def require_blocks(program: Program) -> None:
    """Raises NoBlocks, naming the nearest misses, when nothing is to be converted."""
    if program.converted():
        return
    nearest = [f"{b.path or 'the model'}: {b.reason}" for b in program.blocks if b.reason]
    nearest += [f"{miss.path or 'the model'}: {miss.reason}" for miss in program.near_misses]
    kinds = sorted({b.rows for b in program.blocks if b.reason and b.rows != "token"})
    if kinds:
        hint = f"--include {kinds[0]} takes the blocks it names nevertheless"
    else:
        hint = "moeify looks for linear, activation, linear over the feature axis, with a residual around it"
    if not nearest:
        raise NoBlocks("no feed-forward block was found, and nothing that comes near one", hint=hint)
    shown = "".join(f"\n    {line}" for line in nearest[:5])
    more = f"\n    ... and {len(nearest) - 5} more" if len(nearest) > 5 else ""
    raise NoBlocks(f"no feed-forward block to convert; nearest misses:{shown}{more}", hint=hint)


def rewrite(
    program: Program, given: UserData, model: str, progress: Progress, dumps: Dumps, place: Path | None = None
) -> Report:
    """Find, rewrite and verify a captured program in place. ``place`` is where the model was read.

    Raises VerificationFailed when an exact method is not.
    """
    progress.stage("finding feed-forward blocks")
    run(program, FIND, dumps.after)
    require_blocks(program)
    batch = given.prepare(program, progress, place)
    stage.check(program)
    report = reporting.describe(program, model)
    progress.stage("recording the dense model")
    dense = _recorded(program, batch)
    progress.stage("rewriting")
    run(program, REWRITE, dumps.after)
    progress.stage("computing expert weights", total=len(program.pending))
    program.materialise(lambda name: progress.advance())
    _verify_all_on(report, program, dense)
    split = stage.to_be_fitted(program)
    if split:
        progress.stage("fitting routers and down projections", total=len(split))
        reporting.fitted(report, stage.fit(program, progress.advance))
        assert program.profile is not None
        report.model_error_on_fitted_data = any(batch is one for one in program.profile.batches)
    reporting.complete(report, program)
    progress.stage("verifying")
    _verify(report, program, dense)
    return report


def _recorded(program: Program, batch: tuple[torch.Tensor, ...]) -> Recording:
    """Raises BadInputSpec when the model does not run on the batch, VerificationFailed when all it gives is NaN."""
    try:
        dense = Recording(program, batch)
    except (RuntimeError, IndexError, ValueError) as error:
        if batch is program.example:  # the capture has run on it
            raise
        raise BadInputSpec(f"the model does not run on the data: {first_line(error)}") from error
    whole = any(value.isfinite().any() for value in dense.outputs)
    if not whole or not all(value.isfinite().any() for value in dense.blocks.values()):
        raise VerificationFailed(
            "the dense model gives nothing but NaN and infinity on these inputs, so nothing can be compared",
            hint="give others, with --input or --data",
        )
    return dense


def _verify_all_on(report: Report, program: Program, dense: Recording) -> None:
    """Hold every split block with all experts on against the dense one: a partition may lose nothing."""
    tolerance = tolerance_for(program)
    errors = all_on_errors(program, dense)
    for entry in report.blocks:
        entry.all_on_error = errors.get(entry.anchor)
        if entry.all_on_error is not None and not entry.all_on_error <= tolerance:
            raise VerificationFailed(
                f"the experts of {entry.method}, all on, are not the dense block: the relative error is "
                f"{entry.all_on_error:.1e}, above {tolerance:.0e}",
                where=entry.path,
                hint="nothing was written; this is a bug in moeify: please report it",
            )


def _verify(report: Report, program: Program, dense: Recording) -> None:
    report.tolerance = tolerance_for(program)
    errors = dense.block_errors(program)
    converted = [entry for entry in report.blocks if entry.converted]
    for entry in converted:
        entry.relative_error = errors[entry.anchor]
    report.model_relative_error = dense.model_error(program)
    report.max_relative_error = max([report.model_relative_error, *errors.values()])
    for entry in converted:
        if entry.exact and not errors[entry.anchor] <= report.tolerance:
            raise VerificationFailed(
                f"{entry.method} with {entry.router} promises to keep the function, and the relative error is "
                f"{errors[entry.anchor]:.1e}, above {report.tolerance:.0e}",
                where=entry.path,
                hint="nothing was written; this is a bug in moeify: please report it",
            )
    if all(entry.exact for entry in converted) and not report.model_relative_error <= report.tolerance:
        raise VerificationFailed(
            f"every block is within {report.tolerance:.0e} of the dense one and the whole model is off by "
            f"{report.model_relative_error:.1e}",
            hint="nothing was written; the model amplifies rounding: try it in float64, or with other inputs (--data)",
        )
    report.verified = True


def captured(
    model: str | Path, inputs: Sequence[str], factory: str | None, allow: Sequence[str], progress: Progress
) -> tuple[Program, list[str]]:
    """The program of a model file and the notes of its reading; the dense module itself is let go."""
    if frontend.holds_metadata(model, METADATA):
        raise UnreadableFile(
            f"{model} is a .pt2 that moeify has already converted", hint=f"look at it with: moeify inspect {model}"
        )
    progress.stage(f"reading {model}")
    loaded = frontend.load(model, factory=factory, allow=allow)
    progress.stage("capturing the graph")
    program = frontend.capture(loaded.module, inputs or None)
    program.provenance.update(source=str(loaded.path), kind=loaded.kind, sha256=loaded.sha256)
    notes = list(loaded.notes)
    del loaded
    gc.collect()  # torch.export leaves cycles that hold the module, and with it weights that materialise would free
    return program, notes


def check_output(path: Path, model: Path) -> None:
    if path.is_dir():
        raise OutputNotWritten(f"cannot write {path}: it is a folder")
    if path.suffix != ".pt2":
        raise UsageError(f"the output {path} does not end in .pt2", hint=f"write {path.with_suffix('.pt2')}")
    if not path.parent.is_dir():
        raise OutputNotWritten(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.exists() and model.exists() and path.samefile(model):
        raise UsageError(f"the output {path} is the dense model itself", hint="choose another --output")
