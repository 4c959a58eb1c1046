"""``moeify inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeify.cli import flags, options
from moeify.cli.output import Screen, only_json, write_json, write_text
from moeify.errors import UsageError

if TYPE_CHECKING:
    from moeify.api import Inspection
    from moeify.ir.program import Program


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A dense model, or a file that convert wrote.")],
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph, layers that are alike once.")] = False,
    blocks: Annotated[bool, typer.Option("--blocks", help="Every block with all that is known of it.")] = False,
    near_misses: Annotated[
        bool, typer.Option("--near-misses", help="What looks like a feed-forward block and is not.")
    ] = False,
    diff: Annotated[bool, typer.Option("--diff", help="The graph before and after conversion.")] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="With --diff: compare with this file, as what was before."),
    ] = None,
    dot: Annotated[Path | None, typer.Option(metavar="OUT.dot", help="Write the folded graph for Graphviz.")] = None,
    graphml: Annotated[
        Path | None, typer.Option(metavar="OUT.graphml", help="Write the whole graph as GraphML.")
    ] = None,
    routing: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Run a converted FILE on a .txt, a folder of images or tensors and show what its routers do, and what "
            "experts tell of the labels: an image's sub-folder, the tensor 'labels', or of a text the tokens.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="With --routing: the loads and agreements as a picture.")
    ] = None,
    tokenizer: options.Tokenizer = None,
    sequence: options.Sequence = None,
    image_mean: options.ImageMean = None,
    image_std: options.ImageStd = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --routing: rows of a block after which it stops.")
    ] = 8192,
    method: options.Method = None,
    experts: options.Experts = None,
    top_k: options.TopK = None,
    router: options.Router = None,
    router_losses: options.RouterLosses = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    shared: options.Shared = None,
    shared_gate: options.SharedGate = None,
    select: options.Select = None,
    include: options.Include = [],  # noqa: B006
    overrides: options.Overrides = [],  # noqa: B006
    recipe_file: options.RecipeFile = None,
    seed: options.Seed = None,
    inputs: options.Inputs = [],  # noqa: B006
    factory: options.Factory = None,
    allow: options.Allow = [],  # noqa: B006
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what convert would do with a dense model, or what it did to a converted one."""
    if routing is not None:
        reading = {
            "tokenizer": tokenizer,
            "sequence": sequence,
            "image_mean": flags.numbers("--image-mean", image_mean),
            "image_std": flags.numbers("--image-std", image_std),
        }
        _routing(file, routing, plot, reading, tokens, as_json)
        return
    if any(one is not None for one in (plot, tokenizer, sequence, image_mean, image_std)):
        raise UsageError(
            "--plot, --tokenizer, --sequence, --image-mean and --image-std go with --routing",
            hint="add --routing DATA",
        )
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
        blocks=select,
        seed=seed,
    )
    from moeify import api

    with only_json(as_json):
        seen = api.inspect_file(file, recipe=recipe, inputs=inputs, factory=factory, allow=allow)
        before = seen.dense
        if against:
            other = api.inspect_file(against, recipe=recipe, inputs=inputs, factory=factory, allow=allow)
            before = other.dense or other.program
    held = seen.dense or seen.program  # what the file holds, not what it would become
    _write_files(held, dot, graphml)
    if as_json:
        write_json(_json(seen, held, graph))
        return
    screen = Screen()
    if graph:
        from moeify.cli import drawing

        drawing.graph(screen, held)
    if diff or against:
        _diff(screen, file, before, seen.program)
    if not (graph or diff or against) or blocks or near_misses:
        _report(screen, file, seen, blocks, near_misses)
    for path in filter(None, (dot, graphml)):
        screen.line(f"wrote {path}")


def _routing(file: str, data: Path, plot: Path | None, reading: dict[str, Any], tokens: int, as_json: bool) -> None:
    """``reading`` are fields of ``Options``."""
    from moeify.api.routing import routing_file
    from moeify.cli import routing_summary
    from moeify.data.examples import Options

    if plot is not None:
        from moeify.cli import plots

        plots.check(plot)
    with only_json(as_json):
        found = routing_file(Path(file), data, options=Options(**reading), tokens=tokens)
    if plot is not None:
        from moeify.cli import routing_chart

        routing_chart.draw(found.report, plot, found.classes)
    if as_json:
        write_json(found.to_dict())
        return
    screen = Screen()
    routing_summary.show(screen, found)
    if plot is not None:
        screen.line(f"wrote {plot}")


def _write_files(program: Program, dot: Path | None, graphml: Path | None) -> None:
    if not (dot or graphml):
        return
    from moeify.ir.views import dot as graphs

    if dot:
        write_text(dot, graphs.dot(program))
    if graphml:
        write_text(graphml, graphs.graphml(program))


def _json(seen: Inspection, held: Program, graph: bool) -> dict[str, Any]:
    """The report; with --graph the graph's text too."""
    if not graph:
        return seen.report.to_dict()
    from moeify.ir.printer import program_text

    return {**seen.report.to_dict(), "graph": program_text(held)}


def _diff(screen: Screen, file: str, before: Program | None, after: Program) -> None:
    if before is None:
        raise UsageError(
            f"{file} is converted already and does not hold what it was before",
            hint=f"name the dense model: moeify inspect {file} --diff --against DENSE.pt",
        )
    from moeify.cli import drawing
    from moeify.ir.views.diff import diff

    drawing.changes(screen, diff(before, after))


def _report(screen: Screen, file: str, seen: Inspection, in_full: bool, near_misses: bool) -> None:
    from moeify.cli import summary

    report = seen.report
    count = sum(block.converted for block in report.blocks)
    verb = "converted" if seen.dense is None else "would be converted"
    screen.line(f"{file}: {count} of {len(report.blocks)} feed-forward blocks {verb}", "bold")
    if in_full:
        summary.blocks_in_full(screen, report)
    else:
        summary.blocks_table(screen, report)
    if near_misses:
        summary.near_misses(screen, report)
    summary.facts(screen, report, hint=None if near_misses else f"moeify inspect {file} --near-misses")
    if seen.dense is None:
        summary.proof(screen, report)
