"""What ``moeify inspect --routing`` shows: a heat map of loads, figures by block, agreement between blocks, and what
experts tell of labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.cli import label_summary
from moeify.cli.figures import table
from moeify.cli.heat import FULL, heat_row
from moeify.cli.output import Screen

if TYPE_CHECKING:
    from moeify.api.routing import FileRouting

_COLUMN = 13


def show(screen: Screen, found: FileRouting) -> None:
    report = found.report
    screen.line(f"{found.model}: what its routers do", "bold")
    screen.line()
    names = [block.path or "(the model)" for block in report.blocks]
    column = max(len(name) for name in names) + 2
    for name, block in zip(names, report.blocks):
        for cells in heat_row(name, block.load, column):
            screen.line(cells)
    screen.line()
    header = ("block", "tokens", "experts", "entropy", "cv", "max/mean", "per token", "dropped")
    rows = [
        (
            name,
            str(block.tokens),
            str(len(block.load)),
            f"{block.entropy:.3f}",
            f"{block.cv:.2f}",
            f"{block.peak:.2f}",
            f"{block.experts_per_token:.2f}",
            f"{block.dropped:.1%}",
        )
        for name, block in zip(names, report.blocks)
    ]
    for number, line in enumerate(table(header, rows, screen.width)):
        screen.line(line, "bold" if number == 0 else None)
    screen.line()
    label_summary.show(screen, report.blocks, found.classes)
    screen.paragraph(
        "load",
        f"a cell is an expert: empty without tokens, full from {FULL:g} times the mean; entropy 1 is equal loads",
        column=_COLUMN,
    )
    pairs = [
        (value, names[i], names[i + 1])
        for i in range(len(names) - 1)
        if (value := report.agreement[i][i + 1]) is not None
    ]
    if pairs:
        mean = sum(value for value, _, _ in pairs) / len(pairs)
        value, one, other = max(pairs)
        text = (
            f"{mean:.2f} on average between a block and the next, at most {value:.2f} ({one} and {other}); 1: the same "
            "tokens are together, 0: independent"
        )
        screen.paragraph("agreement", text, column=_COLUMN)
    if found.labels is not None:
        text = (
            f"{found.labels}; mutual information: what a token's expert tells of it, in nats; by chance: the same were "
            "labels dealt at random, which few tokens of many labels make large"
        )
        screen.paragraph("label", text, column=_COLUMN)
    screen.paragraph("data", found.source, column=_COLUMN)
    for note in found.notes:
        screen.paragraph("note", note, column=_COLUMN)
