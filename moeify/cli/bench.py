"""``moeify bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeify.cli import options
from moeify.cli.output import Screen, only_json, write_json
from moeify.errors import BadOption

if TYPE_CHECKING:
    from moeify.api.bench import Bench, Row

_COLUMN = 13


def bench(
    files: Annotated[list[str], typer.Argument(metavar="FILE.pt2...", help="What 'moeify convert' wrote.")],
    tokens: Annotated[
        str, typer.Option(metavar="N,N,...", help="Tokens (batch x sequence) in one call, swept.")
    ] = "1,16,128,512",
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="Threads of every runtime.")] = 2,
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Times each is timed, in turn.  [5 to 15]")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png|.svg", help="Draw time over dense by tokens (needs matplotlib).")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time FILE and its dense twin side by side: PyTorch, ONNX Runtime by every lowering that fits, and TVM."""
    counts = _counts(tokens)
    if plot is not None:
        from moeify.cli import plots

        plots.check(plot)  # before minutes of measuring
    from moeify.api.bench import bench_files
    from moeify.cli.progress import Bars

    with only_json(as_json), Bars() as bars:
        made = bench_files(files, tokens=counts, threads=threads, rounds=rounds, progress=bars)
    if plot is not None:
        from moeify.cli import chart

        chart.draw(made.rows, plot)
    if as_json:
        write_json({**made.to_dict(), "plot": str(plot) if plot else None})
        return
    screen = Screen()
    for name in dict.fromkeys(row.model for row in made.rows):
        _table(screen, name, [row for row in made.rows if row.model == name])
    _facts(screen, made)
    if plot is not None:
        screen.paragraph("wrote", str(plot), column=_COLUMN, style="bold")


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise BadOption(f"cannot read --tokens {text!r}", hint="write --tokens 1,16,128,512")
    return counts


def _table(screen: Screen, name: str, rows: list[Row]) -> None:
    from moeify.cli.figures import table

    header = ("tokens", "runtime", "lowering", "median", "/ dense", "/ floor")
    cells = [
        (
            str(row.tokens),
            row.runtime,
            row.lowering,
            f"{row.median_ms:.2f} ms",
            "" if row.ratio_to_dense is None else f"{row.ratio_to_dense:.2f}",
            f"{row.ratio_to_floor:.2f}",
        )
        for row in rows
    ]
    screen.line(name, "bold")
    for number, line in enumerate(table(header, cells, screen.width)):
        screen.line(line, "bold" if number == 0 else None)
    screen.line()


def _facts(screen: Screen, made: Bench) -> None:
    screen.paragraph(
        "machine",
        f"{made.peak_flops / 1e9:.0f} GFLOP/s in a large matrix product, {made.peak_bandwidth / 1e9:.1f} GB/s read "
        f"from memory, on {made.threads} threads",
        column=_COLUMN,
    )
    screen.paragraph("dense", "the same model with dense blocks of the old width, on the same runtime", column=_COLUMN)
    screen.paragraph(
        "floor", "what the model's FLOPs and bytes take at the machine's rates, block by block", column=_COLUMN
    )
    for note in made.notes:
        screen.paragraph("note", note, column=_COLUMN)
