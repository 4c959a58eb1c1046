"""An ExportReport on the screen."""

from __future__ import annotations

from moeify.cli.figures import error, table
from moeify.cli.output import Screen
from moeify.ir.export_report import ExportedCall, ExportReport
from moeify.ir.views.labels import group_paths, label

COLUMN = 13


def show(report: ExportReport) -> None:
    """What was chosen and why, the proof, and the files."""
    screen = Screen()
    what = f"{len(report.blocks)} expert blocks lowered to {report.backend} ({report.target}, {report.dtype})"
    screen.line(f"{report.model}: {what} in {report.seconds:.1f} s", "bold")
    _blocks(screen, report)
    screen.line()
    for text in report.notes:
        screen.paragraph("note", text, column=COLUMN)
    for text in report.warnings:
        screen.paragraph("warning", text, column=COLUMN, style="yellow")
    if report.backend == "onnxruntime" and report.target == "cuda":
        _readiness(screen, report)
    _proof(screen, report)
    size = f"{report.bytes / 1e6:.1f} MB" if report.bytes < 1e9 else f"{report.bytes / 1e9:.2f} GB"
    screen.paragraph("wrote", f"{', '.join(report.files)} ({size})", column=COLUMN, style="bold")


def _blocks(screen: Screen, report: ExportReport) -> None:
    rows = []
    for group in _alike(report.blocks):
        first = group[0]
        name = label([entry.path for entry in group]) or "(model)"
        errors = [entry.relative_error for entry in group if entry.relative_error is not None]
        rows.append(
            (
                f"{name}  x{len(group)}" if len(group) > 1 else name,
                f"{first.experts} top-{first.top_k}",
                first.lowering,
                error(max(errors) if errors else None),
                first.why,
            )
        )
    lines = table(("block", "experts", "lowering", "error", "because"), rows, screen.width)
    heads = len(lines) // (len(rows) + 1)
    screen.line()
    for number, line in enumerate(lines):
        screen.line(line, "bold" if number < heads else None)


def _alike(blocks: list[ExportedCall]) -> list[list[ExportedCall]]:
    """Blocks lowered alike whose paths fold."""
    same: dict[tuple, list[ExportedCall]] = {}
    for entry in blocks:
        same.setdefault((entry.lowering, entry.why, entry.experts, entry.top_k), []).append(entry)
    return [[m[i] for i in group] for m in same.values() for group in group_paths([entry.path for entry in m])]


def _readiness(screen: Screen, report: ExportReport) -> None:
    moved = [one for one in report.placements if one.get("matters", True)]
    if not moved:
        screen.paragraph("cuda", "every node that computes is one the CUDA provider takes", column=COLUMN)
    for one in moved:
        where = "will run on the CPU" if one["provider"] != "cuda" else "will fail or go wrong on CUDA"
        screen.paragraph("cuda", f"{one['node']} ({one['op']}) {where}: {one['why']}", column=COLUMN)
    if report.provider != "cuda":
        text = "nothing was run on a GPU: the CUDA provider is not usable here, so the check above is against a table"
        screen.paragraph("", text, column=COLUMN)


def _proof(screen: Screen, report: ExportReport) -> None:
    largest = max((entry.relative_error or 0.0 for entry in report.blocks), default=0.0)
    text = (
        f"on {report.verified_on}: every block within {report.tolerance:.0e} of the program "
        f"(largest {error(largest)}), whole model {error(report.model_relative_error)}"
    )
    screen.paragraph("verified", text, column=COLUMN, style="bold")
    if report.rerouted:
        text = (
            f"{report.rerouted} of {report.tokens_verified} token choices went to other experts at a near-tie of "
            "scores; they are in the whole model's error and not in the blocks'"
        )
        screen.paragraph("", text, column=COLUMN)
