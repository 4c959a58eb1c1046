"""``moeify profile``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeify.cli import flags, options
from moeify.cli.convert import default_output
from moeify.cli.output import Screen, only_json, write_json

if TYPE_CHECKING:
    from moeify.api import ProfileReport

_COLUMN = 15


def profile(
    model: options.Model,
    data: Annotated[
        Path, typer.Option(metavar="DATA", help="A .txt, a folder of images, or tensors, an example to a row.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT.profile", help="What to write.  [MODEL's name with .profile, here]"
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    sequence: options.Sequence = None,
    image_mean: options.ImageMean = None,
    image_std: options.ImageStd = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows (tokens, patches) of a block after which it stops.")
    ] = 32768,
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows of each block's input that are kept, for fitting.")
    ] = 4096,
    top: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Largest hidden units of a row that count as firing.  [10]")
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Measure what each hidden unit does to the loss, too.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Examples that are run at a time.")] = 8,
    blocks: options.Blocks = None,
    include: options.Include = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    seed: options.Seed = None,
    inputs: options.Inputs = [],  # noqa: B006
    factory: options.Factory = None,
    allow: options.Allow = [],  # noqa: B006
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run MODEL on DATA, see how its hidden units are used, and write OUT.profile for 'moeify convert --profile'."""
    recipe = flags.recipe(None, [], include, blocks=blocks, seed=seed)
    mean, std = flags.numbers("--image-mean", image_mean), flags.numbers("--image-std", image_std)
    from moeify import api
    from moeify.api.profile import Settings
    from moeify.cli.progress import Bars
    from moeify.data.examples import Options

    with only_json(as_json), Bars() as bars:
        report = api.profile_to_file(
            model,
            data,
            output or default_output(model, "profile"),
            options=Options(tokenizer, sequence, mean, std, batch, recipe.seed),
            settings=Settings(samples, tokens, top, gradients),
            recipe=recipe,
            inputs=inputs,
            factory=factory,
            allow=allow,
            progress=bars,
        )
    if as_json:
        write_json(report.to_dict())
        return
    _show(Screen(), report)


def _show(screen: Screen, report: ProfileReport) -> None:
    from moeify.cli.figures import table

    rows = report.rows()
    facts = report.profile.facts
    header = ("block", "rows", "units", "active", "in top 25 %", "dead", "most frequent")
    cells = [
        (
            row["path"] or "(the model)",
            str(row["tokens"]),
            str(row["units"]),
            f"{row['active']:.1%}",
            f"{row['top_quarter']:.1%}",
            str(row["dead"]),
            f"{row['highest_firing']:.1%}",
        )
        for row in rows
    ]
    screen.line(f"{report.model}: {len(rows)} feed-forward blocks profiled in {report.seconds:.1f} s", "bold")
    screen.line()
    for number, line in enumerate(table(header, cells, screen.width)):
        screen.line(line, "bold" if number == 0 else None)
    screen.line()
    for name, meaning in (
        ("active", "share of hidden values that are not zero; dead units are zero in every row"),
        ("in top 25 %", "share of the squared hidden value in a row's largest quarter of units"),
        (
            "most frequent",
            f"share of rows that have the unit among their {report.profile.top} largest, for the top unit",
        ),
    ):
        screen.paragraph(name, meaning, column=_COLUMN)
    screen.line()
    screen.paragraph("data", facts["source"], column=_COLUMN)
    screen.paragraph("gradients", f"of {facts['loss']}" if facts["loss"] != "none" else "not measured", column=_COLUMN)
    for note in report.notes:
        screen.paragraph("note", note, column=_COLUMN)
    screen.paragraph("wrote", report.output, column=_COLUMN, style="bold")
