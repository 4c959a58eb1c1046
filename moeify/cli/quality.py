"""``moeify quality``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeify.cli import flags, options
from moeify.cli.output import Screen, only_json, write_json

if TYPE_CHECKING:
    from moeify.api import QualityReport

_COLUMN = 13


def quality(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The model that was converted.")],
    moe: Annotated[str, typer.Argument(metavar="MOE", help="The .pt2 or folder that came of it.")],
    data: Annotated[
        Path,
        typer.Option(metavar="DATA", help="Held out from the conversion: a .txt, a folder of images, or tensors."),
    ],
    tokenizer: options.Tokenizer = None,
    sequence: options.Sequence = None,
    image_mean: options.ImageMean = None,
    image_std: options.ImageStd = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows (tokens, patches) of a block after which it stops.")
    ] = 8192,
    classes: Annotated[
        bool, typer.Option("--classes", help="An output [batch, classes] is scores, though not named logits.")
    ] = False,
    least: Annotated[
        float | None,
        typer.Option("--at-least-agreement", min=0.0, max=1.0, metavar="X", help="Exit code 1 where it is lower."),
    ] = None,
    most: Annotated[
        float | None,
        typer.Option("--at-most-perplexity-ratio", min=0.0, metavar="X", help="Exit code 1 where it is higher."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Examples that are run at a time.")] = 8,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order of the examples.")] = 0,
    inputs: options.Inputs = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    factory: options.Factory = None,
    allow: options.Allow = [],  # noqa: B006
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> int:
    """Run DENSE and MOE on DATA and say how far MOE is from DENSE: blocks, experts' loads and predictions."""
    mean, std = flags.numbers("--image-mean", image_mean), flags.numbers("--image-std", image_std)
    from moeify import api
    from moeify.api.quality import Settings
    from moeify.cli.progress import Bars
    from moeify.data.examples import Options

    with only_json(as_json), Bars() as bars:
        report = api.quality_files(
            dense,
            moe,
            data,
            options=Options(tokenizer, sequence, mean, std, batch, seed),
            settings=Settings(tokens, classes, least, most),
            inputs=inputs,
            factory=factory,
            allow=allow,
            progress=bars,
        )
    if as_json:
        write_json(report.to_dict())
    else:
        _show(Screen(), report)
    return 1 if report.missed else 0


def _show(screen: Screen, report: QualityReport) -> None:
    from moeify.cli.figures import error, table

    screen.line(f"{report.moe} against {report.dense}, in {report.seconds:.1f} s", "bold")
    screen.line()
    header = ("block", "rows", "rms error", "cosine", "experts", "entropy", "cv", "max/mean")
    rows = [
        (
            one.path or "(the model)",
            str(one.rows),
            f"{one.rms_error:.3g}",
            f"{one.cosine:.4f}",
            str(len(one.load)),
            f"{one.load_entropy:.3f}",
            f"{one.load_cv:.2f}",
            f"{one.load_peak:.2f}",
        )
        for one in report.blocks
    ]
    for number, line in enumerate(table(header, rows, screen.width)):
        screen.line(line, "bold" if number == 0 else None)
    screen.line()
    header = ("output", "of", "predictions", "agreement", "KL, nats", "cosine", "rms error", "largest error")
    cells = [
        (
            one.name,
            one.kind,
            str(one.predictions or ""),
            "" if one.agreement is None else f"{one.agreement:.2%}",
            "" if one.divergence is None else f"{one.divergence:.3g}",
            "" if one.cosine is None else f"{one.cosine:.4f}",
            f"{one.rms_error:.3g}",
            error(one.max_relative_error),
        )
        for one in report.outputs
    ]
    for number, line in enumerate(table(header, cells, screen.width)):
        screen.line(line, "bold" if number == 0 else None)
    screen.line()
    for one in report.outputs:
        if one.perplexity_ratio is not None:
            text = f"{one.dense_perplexity:.4g} dense, {one.perplexity:.4g} converted: {one.perplexity_ratio:.4f} times"
            screen.paragraph("perplexity", text, column=_COLUMN, style="bold")
    text = (
        "errors on the dense model's own inputs; entropy (1: equal), cv and max/mean of the experts' loads as it runs"
    )
    screen.paragraph("blocks", text, column=_COLUMN)
    screen.paragraph("data", f"{report.source}; {report.batches} batches were run", column=_COLUMN)
    for note in report.notes:
        screen.paragraph("note", note, column=_COLUMN)
    for text in report.missed:
        screen.paragraph("missed", text, column=_COLUMN, style="bold")
