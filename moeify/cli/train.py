"""``moeify train``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from moeify.cli import flags, options
from moeify.cli.convert import default_output
from moeify.cli.output import Screen, only_json, write_json


def train(
    model: Annotated[Path, typer.Argument(metavar="MODEL.pt2", help="What 'moeify convert' wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.pt2", help="What to write.  [MODEL's name with .trained.pt2]"),
    ] = None,
    data: options.Examples = None,
    test: Annotated[
        Path | None, typer.Option(metavar="DATA", help="To measure on, read as --data is.  [a part of --data]")
    ] = None,
    test_part: Annotated[
        float | None,
        typer.Option(metavar="X", help="Without --test: the last part of --data, not trained on; 0 for none.  [0.1]"),
    ] = None,
    test_examples: Annotated[
        int | None, typer.Option(metavar="N", help="Examples that are measured on, at most.  [64]")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Of a text: its folder, a .gguf file, or 'bytes'.")
    ] = None,
    sequence: options.Sequence = None,
    image_mean: options.ImageMean = None,
    image_std: options.ImageStd = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="pkg.mod:fn",
            help="fn(output, batch).  [next tokens; of classes, an image's folder or the tensor 'labels' in the data]",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="Learn to do what this model does, with or without a loss of your own."),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Distance to the teacher: kl, mse, cosine.  [kl of predictions, else mse]"),
    ] = None,
    distill_weight: Annotated[
        float | None, typer.Option(metavar="X", help="Its share; the loss of the task has the rest.  [1]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="That both models' scores are divided by, for kl.  [1]")
    ] = None,
    consistency: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Run each batch twice and add X times how far the two predictions are apart (KL, in nats): for "
            "routers or dropout that are random in training.  [0]",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="What is trained: all, experts, routers, or ffn for both.  [all]",
        ),
    ] = None,
    router_losses: options.RouterLosses = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    steps: Annotated[int | None, typer.Option(metavar="N", help="Updates of the weights.  [1000]")] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Examples of a step.  [8]")] = None,
    accumulate: Annotated[
        int | None, typer.Option(metavar="N", help="Run a batch in so many parts, to save memory.  [1]")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="X", help="AdamW's learning rate.  [1e-4]")] = None,
    warmup: Annotated[
        int | None, typer.Option(metavar="N", help="Steps in which the rate rises to it.  [a twentieth]")
    ] = None,
    decay: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the rate does then: cosine (to 0), constant.  [cosine]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="X", help="AdamW's.  [0.01]")] = None,
    clip: Annotated[
        float | None, typer.Option(metavar="X", help="Largest norm of the gradients, 0 for any.  [1]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of the order of the examples and of dropout.  [0]")
    ] = None,
    dropout: Annotated[
        bool | None,
        typer.Option(
            "--dropout/--no-dropout",
            help="The model's own dropout. Without it a split comes closer to its teacher in few steps.  [on]",
        ),
    ] = None,
    amp: Annotated[
        bool | None, typer.Option("--amp/--no-amp", help="Compute in bfloat16 where that is safe (autocast).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda.  [cuda where there is a GPU]")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(metavar="N", help="Measure every N steps too, not only before and after.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where they are kept.  [OUT.checkpoints, until OUT is written]"),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps from one checkpoint to the next.  [100]")
    ] = None,
    keep: Annotated[int | None, typer.Option(metavar="N", help="Newest checkpoints that stay.  [2]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="These flags in the table [train] of a TOML file; flags given here win."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the losses; ends in .png or .svg (needs matplotlib).")
    ] = None,
    factory: options.Factory = None,
    allow: options.Allow = [],  # noqa: B006
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train a converted model, on a task or to do what the dense model does, and write OUT.pt2."""
    given: dict[str, Any] = {
        "data": data, "test": test, "test_part": test_part, "test_examples": test_examples, "tokenizer": tokenizer,
        "sequence": sequence, "image_mean": flags.numbers("--image-mean", image_mean),
        "image_std": flags.numbers("--image-std", image_std), "loss": loss, "teacher": teacher, "distill": distill,
        "distill_weight": distill_weight, "temperature": temperature, "consistency": consistency, "only": only,
        "router_losses": tuple(router_losses) or None, "steps": steps,
        "batch": batch, "accumulate": accumulate, "lr": lr, "warmup": warmup, "decay": decay,
        "weight_decay": weight_decay, "clip": clip, "seed": seed, "dropout": dropout, "amp": amp, "device": device,
        "eval_every": eval_every, "checkpoints": checkpoints, "save_every": save_every, "keep": keep,
        "factory": factory, "allow": tuple(allow) or None,
    }  # fmt: skip
    from moeify.api.train import train_file
    from moeify.api.train_options import TrainOptions, read_table
    from moeify.cli import plots, train_chart, train_summary

    said = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v is not None}
    told = TrainOptions(**{**(read_table(recipe) if recipe is not None else {}), **said})
    if plot is not None:
        plots.check(plot)
    target = output or default_output(str(model), "trained.pt2")
    with only_json(as_json), train_summary.Watch(told.steps, quiet=as_json) as watch:
        report = train_file(
            model, target, told, resume=resume, progress=watch.bars, step=watch.step, measured=watch.measured
        )
    if plot is not None:
        train_chart.draw(report, plot)
        report.plot = str(plot)
    if as_json:
        write_json(report.to_dict())
    else:
        train_summary.show(Screen(), report)
    if report.run.stopped:
        # typer.Exit(130) would be taken for a Ctrl-C that ended the command at once.
        raise SystemExit(128 + signal.Signals[report.run.stopped])
