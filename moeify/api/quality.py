"""What a conversion costs in quality: the dense and the converted model side by side on held-out data."""

from __future__ import annotations

import gc
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeify import frontend
from moeify.api.convert import captured, require_blocks
from moeify.api.load import load, read_graph
from moeify.api.output_kinds import PREDICTIONS, OutputKind, output_kinds
from moeify.api.progress import Progress, Silent
from moeify.api.quality_report import BlockQuality, OutputQuality, QualityReport
from moeify.api.quality_runs import BlockMeasures, MixtureRun, OutputMeasures, Record, Records, dense_run
from moeify.backends.calls import find_calls
from moeify.backends.pt2.archive import METADATA
from moeify.data import tensors as data_files
from moeify.data.examples import Options, open_data
from moeify.errors import BadInputSpec, BadOption, UsageError
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.ir.report import Report
from moeify.pipeline.default import FIND
from moeify.pipeline.runner import run

TOKENS = 8192  # rows of a block after which no further batch is run


@dataclass(frozen=True)
class Settings:
    """How much is run, whether an output [batch, classes] is scores, and what a model must reach."""

    tokens: int = TOKENS
    classes: bool = False
    at_least_agreement: float | None = None
    at_most_perplexity_ratio: float | None = None


@dataclass(frozen=True)
class _Model:
    """A model and how to read it, for the time that it is needed."""

    name: str
    read: Callable[[], tuple[Program, Sequence[str]]]  # with the notes of the conversion
    place: Path | None = None


@dataclass(frozen=True)
class _Dense:
    """What is left of the dense model when it is gone."""

    inputs: list[str]
    kinds: list[OutputKind]
    paths: dict[str, str]  # of the blocks, by anchor
    calls: set[tuple[str, int]]
    source: str
    notes: list[str]
    batches: int


def quality(
    dense: nn.Module | str | Path,
    moe: nn.Module | str | Path,
    data: Any,
    *,
    inputs: Sequence[str] | Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    tokenizer: str | Path | None = None,
    sequence: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    tokens: int = TOKENS,
    classes: bool = False,
    batch: int = Options.batch,
    seed: int = 0,
    factory: str | None = None,
    allow: Sequence[str] = (),
) -> QualityReport:
    """How far a converted model is from the dense one on data that nothing was fitted to.

    ``dense`` and ``moe`` are modules (``moeify.convert`` changes its argument, so convert a copy) or paths, ``data``
    what ``moeify.profile`` takes. At most ``tokens`` rows of a block, to the next whole batch, are run; ``classes``
    says that outputs [batch, classes] are scores, also where they are not named logits; ``factory`` and ``allow`` are
    of files, as in ``verify_files``.

    What the dense model gives is kept in a temporary folder (4 bytes for each value of every block's output and of the
    outputs), so that paths have one model in memory at a time. Half-precision models are computed in float32. Raises
    what reading the models and the data raise, UsageError for models that do not belong together.
    """
    options = Options(str(tokenizer) if tokenizer else None, sequence, image_mean, image_std, batch, seed)
    made = [_from_module(one, inputs) if isinstance(one, nn.Module) else None for one in (dense, moe)]
    specs = [text for text in inputs or () if isinstance(text, str)]
    if None in made and (isinstance(inputs, (Mapping, str)) or len(specs) < len(inputs or ())):
        raise UsageError("the inputs of a model file are specs", hint='write "input_ids=int64[batch=2,seq=16]"')
    first = made[0] or _dense_file(str(dense), specs, factory, allow, Silent())
    second = made[1] or _converted_file(str(moe), specs, factory, allow)
    return _measure(first, second, data, options, Settings(tokens, classes), Silent())


def quality_files(
    dense: str | Path,
    moe: str | Path,
    data: str | Path,
    *,
    options: Options,
    settings: Settings,
    inputs: Sequence[str] = (),
    factory: str | None = None,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> QualityReport:
    """``moeify quality``. Raises BadOption for a demand that says nothing of the model's outputs."""
    progress = progress or Silent()
    first = _dense_file(str(dense), inputs, factory, allow, progress)
    second = _converted_file(str(moe), inputs, factory, allow)
    return _measure(first, second, data, options, settings, progress)


def _dense_file(
    path: str, inputs: Sequence[str], factory: str | None, allow: Sequence[str], progress: Progress
) -> _Model:
    return _Model(path, lambda: captured(path, inputs, factory, allow, progress), Path(path))


def _converted_file(path: str, inputs: Sequence[str], factory: str | None, allow: Sequence[str]) -> _Model:
    def read() -> tuple[Program, Sequence[str]]:
        if (Path(path) / METADATA).is_file():
            module = load(path, factory=factory, allow=allow)
            return frontend.capture(module, inputs or None), _notes(module)
        program, metadata = read_graph(Path(path))
        return program, metadata["report"]["notes"]

    return _Model(path, read)


def _from_module(module: nn.Module, inputs: Any) -> _Model:
    return _Model(type(module).__name__, lambda: (frontend.capture(module, inputs), _notes(module)))


def _notes(module: nn.Module) -> list[str]:
    report = getattr(module, "moeify_report", None)
    return report.notes if isinstance(report, Report) else []


def _measure(
    dense: _Model, moe: _Model, data: Any, options: Options, settings: Settings, progress: Progress
) -> QualityReport:
    started = time.perf_counter()
    if settings.tokens < 1:
        raise BadOption(f"the number of tokens is {settings.tokens}: it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="moeify-quality-") as folder:
        records = Records(Path(folder))
        ran = _run_dense(dense, records, data, options, settings, progress)
        gc.collect()  # torch.export leaves cycles that hold the weights
        progress.stage(f"reading {moe.name}")
        program, said = moe.read()
        _check_blocks(program, ran, dense.name, moe.name)
        mixture = MixtureRun(program, ran.kinds)
        progress.stage(f"running {moe.name}", total=ran.batches)
        mixture.compare(_paired(records, ran, program, (dense.name, moe.name), progress))
    blocks = [_block(ran, anchor, one) for anchor, one in mixture.blocks.items()]
    outputs = [output_quality(one) for one in mixture.outputs]
    missed = _missed(outputs, settings)
    notes = [*ran.notes, *_not_held_out(data, said)]
    seconds = time.perf_counter() - started
    return QualityReport(dense.name, moe.name, ran.source, ran.batches, blocks, outputs, missed, notes, seconds)


def _run_dense(
    dense: _Model, records: Records, data: Any, options: Options, settings: Settings, progress: Progress
) -> _Dense:
    program, _ = dense.read()
    kinds = output_kinds(program, settings.classes)
    _check_demands(kinds, settings)
    program.recipe = Recipe(include=("sample", "channel"))  # the converted model may have any of them
    run(program, FIND)
    require_blocks(program)
    found = open_data(data, program, options, dense.place)
    progress.stage(f"running {dense.name}")
    rows = batches = 0
    calls: set[tuple[str, int]] = set()
    with dense_run(program) as one:
        for batch in found.batches:
            record = one(batch)
            records.add(batches, record)
            progress.advance()
            batches, rows, calls = batches + 1, rows + record.rows, set(record.blocks)
            if rows >= settings.tokens:
                break
    if not batches:
        raise BadInputSpec(f"{found.source}: there is no batch in it")
    inputs = [spec.name for spec in program.inputs]
    paths = {block.anchor: block.path for block in program.blocks}
    return _Dense(inputs, kinds, paths, calls, found.source, list(found.notes), batches)


def _not_held_out(data: Any, notes: Sequence[str]) -> list[str]:
    learnt = re.compile(f"profiled on {re.escape(str(data))}[,:]")  # as api.user_data writes it
    if isinstance(data, (str, Path)) and any(learnt.search(note) for note in notes):
        return [f"the conversion learnt from {data} itself: on data held out from it the figures are worse"]
    return []


def _paired(
    records: Records, ran: _Dense, program: Program, names: tuple[str, str], progress: Progress
) -> Iterator[tuple[tuple[Tensor, ...], Record]]:
    """The inputs of the converted program by name where it has the same ones, else in order."""
    same = set(ran.inputs) == {spec.name for spec in program.inputs}
    for number in range(ran.batches):
        record = records.read(number)
        given = dict(zip(ran.inputs, record.inputs)) if same else record.inputs
        yield data_files.fit(given, program.inputs, f"the input of {names[0]}, given to {names[1]}"), record
        progress.advance()


def _check_blocks(program: Program, ran: _Dense, dense: str, moe: str) -> None:
    calls = [(call.block, call.number) for call in find_calls(program.graph)]
    if not calls:
        raise UsageError(f"{moe} has no mixture of experts", hint="give what moeify convert wrote")
    for anchor, number in calls:
        if (anchor, number) not in ran.calls:
            raise UsageError(
                f"{dense} has no feed-forward block where {moe} has a mixture",
                where=anchor,
                hint="give the dense model that was converted",
            )


def _check_demands(kinds: Sequence[OutputKind], settings: Settings) -> None:
    have = {one.kind for one in kinds}
    if settings.at_least_agreement is not None and have.isdisjoint(PREDICTIONS):
        raise BadOption(
            "the outputs of the model predict nothing, so there is no agreement",
            hint="say --classes where its output [batch, classes] is scores",
        )
    if settings.at_most_perplexity_ratio is not None and "next tokens" not in have:
        raise BadOption("the model is no causal language model, so it has no perplexity")


def _missed(outputs: Sequence[OutputQuality], settings: Settings) -> list[str]:
    missed = []
    for one in outputs:
        least, most = settings.at_least_agreement, settings.at_most_perplexity_ratio
        # Written so that NaN misses.
        if least is not None and one.agreement is not None and not one.agreement >= least:
            missed.append(f"agreement of {one.name} is {one.agreement:.4f}, below {least:g}")
        if most is not None and one.perplexity_ratio is not None and not one.perplexity_ratio <= most:
            missed.append(f"perplexity ratio of {one.name} is {one.perplexity_ratio:.4f}, above {most:g}")
    return missed


def _block(ran: _Dense, anchor: str, one: BlockMeasures) -> BlockQuality:
    errors, load = one.errors, one.load
    if not errors.rows:
        raise BadInputSpec(f"{ran.source}: every row of a block is padding", where=ran.paths[anchor])
    return BlockQuality(
        ran.paths[anchor],
        anchor,
        errors.rows,
        errors.rms_error,
        errors.cosine,
        load.share,
        load.entropy,
        load.variation,
        load.peak,
    )


def output_quality(one: OutputMeasures) -> OutputQuality:
    """The figures that belong to the output's kind."""
    kind, found = one.kind, one.predictions
    return OutputQuality(
        kind.name,
        kind.kind,
        one.errors.rows,
        one.largest.relative,
        one.errors.rms_error,
        one.errors.cosine if kind.kind == "embeddings" else None,
        found.rows,
        found.divergence if found.rows else None,
        found.agreement if found.rows else None,
        *(found.perplexities or (None, None)),
    )
