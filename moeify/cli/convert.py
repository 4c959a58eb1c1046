"""``moeify convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeify.cli import flags, options
from moeify.cli.output import only_json, write_json

_SUFFIXES = {".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors"}


def convert(
    model: options.Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.pt2", help="What to write.  [MODEL's name with .moe.pt2, here]"),
    ] = None,
    method: options.Method = None,
    experts: options.Experts = None,
    top_k: options.TopK = None,
    router: options.Router = None,
    router_losses: options.RouterLosses = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    shared: options.Shared = None,
    shared_gate: options.SharedGate = None,
    repair: options.Repair = None,
    blocks: options.Blocks = None,
    include: options.Include = [],  # noqa: B006
    overrides: options.Overrides = [],  # noqa: B006
    recipe_file: options.RecipeFile = None,
    seed: options.Seed = None,
    inputs: options.Inputs = [],  # noqa: B006
    data: options.Learn = None,
    fit_tokens: options.FitTokens = None,
    tokenizer: options.Tokenizer = None,
    sequence: options.Sequence = None,
    image_mean: options.ImageMean = None,
    image_std: options.ImageStd = None,
    profile: options.Profile = None,
    factory: options.Factory = None,
    allow: options.Allow = [],  # noqa: B006
    print_after: Annotated[
        list[str], typer.Option(metavar="PASS", help="Print the graph after this pass. Repeatable.")
    ] = [],  # noqa: B006
    print_after_all: Annotated[
        bool, typer.Option("--print-after-all", help="Print the graph after every pass.")
    ] = False,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Print the seconds each pass took.")] = False,
    dump_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the graph after every pass to DIR.")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Find the feed-forward blocks of MODEL, turn them into mixtures of experts, verify, write OUT.pt2."""
    recipe = flags.recipe(
        recipe_file,
        overrides,
        include,
        method=method,
        experts=experts,
        top_k=top_k,
        router=router,
        router_losses=tuple(router_losses) or None,
        shared=shared,
        shared_gate=shared_gate,
        repair=repair,
        blocks=blocks,
        seed=seed,
        tokens=fit_tokens,
    )
    mean, std = flags.numbers("--image-mean", image_mean), flags.numbers("--image-std", image_std)
    from moeify import api
    from moeify.cli import summary
    from moeify.cli.output import Screen
    from moeify.cli.progress import Bars
    from moeify.data.examples import Options

    with only_json(as_json), Bars() as bars:
        report = api.convert_file(
            model,
            str(output or default_output(model)),
            recipe,
            inputs=inputs,
            data=str(data) if data else None,
            options=Options(tokenizer, sequence, mean, std, seed=recipe.seed),
            profile=str(profile) if profile else None,
            factory=factory,
            allow=allow,
            progress=bars,
            print_after=print_after,
            print_after_all=print_after_all,
            dump_dir=str(dump_dir) if dump_dir else None,
            show=lambda title, text: bars.aside(text),
        )
    if as_json:
        write_json(report.to_dict())
        return
    screen = Screen()
    done = sum(block.converted for block in report.blocks)
    screen.line(
        f"{model}: {done} of {len(report.blocks)} feed-forward blocks converted in {report.seconds:.1f} s",
        "bold",
    )
    summary.blocks_table(screen, report)
    if time_passes:
        summary.passes_table(screen, report)
    summary.facts(screen, report, hint=f"moeify inspect {model} --near-misses")
    summary.fit(screen, report)
    summary.proof(screen, report)
    screen.paragraph("wrote", str(report.output), column=summary.COLUMN, style="bold")


def default_output(model: str, ending: str = "moe.pt2") -> Path:
    """``models/dense.pt`` -> ``dense.moe.pt2`` in the current folder."""
    path = Path(model).absolute()
    name = path.stem if path.suffix in _SUFFIXES else path.name
    return Path(f"{name}.{ending}")
