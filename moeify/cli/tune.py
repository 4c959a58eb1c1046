"""``moeify tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeify.cli import flags, options
from moeify.cli.output import Screen, only_json, write_json


def tune(
    model: options.Model,
    data: Annotated[
        Path,
        typer.Option(metavar="DATA", help="To fit to and to choose by: a .txt, a folder of images, or tensors."),
    ],
    keep: Annotated[
        float | None,
        typer.Option(metavar="Q", help="Least work that keeps this share of the model's quality, such as 0.99."),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(metavar="S", help="Least loss that makes the whole model so many times as fast, such as 1.3."),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(metavar="F", help="Least loss at this share of the feed-forward blocks' work, such as 0.5."),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(metavar="DATA", help="To measure on.  [a part of --data that nothing is fitted to]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT.pt2", help="Write the converted model.")
    ] = None,
    recipe_output: Annotated[
        Path | None,
        typer.Option("--recipe-out", metavar="FILE.toml", help="Write its recipe, for 'moeify convert --recipe'."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the frontier; ends in .png or .svg (needs matplotlib).")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a call that times are expected and taken for.")
    ] = 128,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads of such a call.  [all]")] = None,
    take_time: Annotated[
        bool, typer.Option("--time/--no-time", help="Time conversions in ONNX Runtime, where it is installed.")
    ] = True,
    fit_tokens: options.FitTokens = None,
    test_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows of a block that are measured on, at most.")
    ] = 4096,
    parts: Annotated[int, typer.Option(metavar="N", help="Parts that a block is cut into, at most.")] = 16,
    tries: Annotated[int, typer.Option(min=1, metavar="N", help="Conversions until the target is met, at most.")] = 4,
    points: Annotated[
        int, typer.Option(min=0, metavar="N", help="Convert and measure so many other points of the frontier, too.")
    ] = 0,
    classes: Annotated[
        bool, typer.Option("--classes", help="An output [batch, classes] is scores, though not named logits.")
    ] = False,
    profile: options.Profile = None,
    tokenizer: options.Tokenizer = None,
    sequence: options.Sequence = None,
    image_mean: options.ImageMean = None,
    image_std: options.ImageStd = None,
    blocks: options.Blocks = None,
    include: options.Include = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    seed: options.Seed = None,
    inputs: options.Inputs = [],  # noqa: B006
    factory: options.Factory = None,
    allow: options.Allow = [],  # noqa: B006
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Choose which blocks of MODEL to split and how far, for a quality or a speed, and measure what comes of it."""
    recipe = flags.recipe(None, [], include, blocks=blocks, seed=seed, tokens=fit_tokens)
    mean, std = flags.numbers("--image-mean", image_mean), flags.numbers("--image-std", image_std)
    from moeify.api.tune import tune_file
    from moeify.api.tune_goal import Goal
    from moeify.cli import frontier_chart, plots, tune_summary
    from moeify.cli.progress import Bars
    from moeify.data.examples import Options

    if plot is not None:
        plots.check(plot)
    goal = Goal(
        keep, speedup, tokens, threads, take_time, parts, tries, recipe.tokens, test_tokens, classes,
        str(test) if test else None, points, flops,
    )  # fmt: skip
    with only_json(as_json), Bars() as bars:
        report = tune_file(
            model,
            str(data),
            goal=goal,
            options=Options(tokenizer, sequence, mean, std, seed=recipe.seed),
            recipe=recipe,
            profile=str(profile) if profile else None,
            output=str(output) if output else None,
            recipe_output=str(recipe_output) if recipe_output else None,
            inputs=inputs,
            factory=factory,
            allow=allow,
            progress=bars,
        )
    if plot is not None:
        frontier_chart.draw(report, plot)
        report.plot = str(plot)
    if as_json:
        write_json(report.to_dict())
    else:
        tune_summary.show(Screen(), report)
