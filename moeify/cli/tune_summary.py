"""What ``moeify tune`` says: the choice of each block, the frontier, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeify.cli.figures import table
from moeify.cli.output import Screen

if TYPE_CHECKING:
    from moeify.api.tune_report import BlockChoice, FrontierPoint, TuneReport

_COLUMN = 13


def show(screen: Screen, report: TuneReport) -> None:
    """All of the report."""
    split = sum(block.share < 1 for block in report.blocks)
    screen.line(
        f"{report.model}: {split} of {len(report.blocks)} feed-forward blocks split, for {report.goal} "
        f"{report.target:g}, in {report.seconds:.1f} s",
        "bold",
    )
    screen.line()
    _table(screen, ("block", "hidden units", "on", "experts", "not zero", "loss", "loss at half"), _blocks(report))
    screen.line()
    _table(
        screen,
        ("FFN FLOPs", "loss", report.measure, "measured", f"time at {report.time_tokens} tokens", "measured", ""),
        [_point(point) for point in report.shown()],
    )
    screen.line()
    screen.paragraph(
        "kept", f"{report.measure} {report.quality:.4f}, measured on {report.tested}", column=_COLUMN, style="bold"
    )
    how = "expected, not measured"
    if report.speedup_measured:
        threads = "all cores" if report.threads is None else f"{report.threads} threads"
        how = f"measured in ONNX Runtime on {threads}, lowered to {' and '.join(report.lowerings)} as an export is"
    speed = f"{report.speedup:.2f} x the dense model's at {report.time_tokens} tokens, {how}"
    screen.paragraph("speed", f"{speed}; {report.flops:.0%} of the blocks' FLOPs", column=_COLUMN, style="bold")
    rows = report.rows
    text = f"{report.source}: {rows['fit']} tokens fitted to, {rows['choose']} chosen by; {rows['test']} tested on"
    screen.paragraph("data", text, column=_COLUMN)
    text = "expected before any conversion: nats of KL divergence for scores, 1 - cosine for embeddings"
    screen.paragraph("loss", text, column=_COLUMN)
    text = "expected by the loss and by the cost model, each scaled to what was measured where it was converted"
    screen.paragraph("frontier", text, column=_COLUMN)
    took = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in report.stages.items() if seconds >= 0.05)
    screen.paragraph("took", took, column=_COLUMN)
    for note in report.notes:
        screen.paragraph("note", note, column=_COLUMN)
    for path in (report.output, report.recipe_output, report.plot):
        if path is not None:
            screen.paragraph("wrote", path, column=_COLUMN, style="bold")


def _table(screen: Screen, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for number, line in enumerate(table(header, rows, screen.width)):
        screen.line(line, "bold" if number == 0 else None)


def _blocks(report: TuneReport) -> list[tuple[str, ...]]:
    return [_block(block) for block in report.blocks]


def _block(block: BlockChoice) -> tuple[str, ...]:
    routed = f"{block.experts} top-{block.top_k}"
    return (
        block.path or "(the model)",
        str(block.d_ff),
        f"{block.share:.1%}",
        "dense" if block.share == 1 else f"{routed} + {block.shared} shared" if block.shared else routed,
        f"{block.nonzero:.0%}",
        f"{block.loss:.2g}",
        "" if block.half_loss is None else f"{block.half_loss:.2g}",
    )


def _point(point: FrontierPoint) -> tuple[str, ...]:
    return (
        f"{point.flops:.1%}",
        f"{point.loss:.3g}",
        f"{point.expected_quality:.4f}",
        "" if point.quality is None else f"{point.quality:.4f}",
        f"{point.expected_time:.2f}",
        "" if point.measured_time is None else f"{point.measured_time:.2f}",
        "chosen" if point.chosen else "",
    )
