"""A Report on the screen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from moeify.cli.figures import change, error, table
from moeify.cli.output import Screen
from moeify.ir.report import BlockReport, Report
from moeify.ir.views.labels import group_paths, label

_MEASURED = (
    "relative_error", "all_on_error", "rms_error", "repaired_rms_error", "repaired", "router_agreement", "load_cv",
    "load_entropy",
)  # fmt: skip
COLUMN = 13  # where the text of "verified     ..." begins


def blocks_table(screen: Screen, report: Report) -> None:
    """The blocks that are converted, those alike in one row, then those left dense with their reasons."""
    converted = [block for block in report.blocks if block.converted]
    groups = _alike(converted)
    if groups:
        header = ("block", "shape", "act", "experts", "parameters", "FLOPs/token", "error", "made by")
        one_kind = len({_made_by(block) for block in converted}) == 1
        rows = [_row(group, one_kind) for group in groups]
        lines = table(header, rows, screen.width)
        heads = len(lines) // (len(rows) + 1)
        screen.line()
        for number, line in enumerate(lines):
            screen.line(line, "bold" if number < heads else None)
        if len(groups) < len(converted):
            measured = any(block.relative_error is not None for block in converted)
            largest = "; the error is the largest of its row" if measured else ""
            screen.line(f"  (figures are those of one block{largest})", "dim")
    _left_dense(screen, [block for block in report.blocks if not block.converted])


def blocks_in_full(screen: Screen, report: Report) -> None:
    """Every block with all that is known of it."""
    for block in report.blocks:
        screen.line()
        screen.line(block.path or "(model)", "bold")
        calls = f", called {block.calls} times" if block.calls > 1 else ""
        source = f", {block.source}" if block.source else ""
        screen.paragraph("", f"{_activation(block)}, {_shape(block)}{calls}{source}", column=2)
        if block.converted:
            screen.paragraph("", f"{_made_by(block)}: {_experts(block)}", column=2)
            figures = f"parameters {change(block.parameters_before, block.parameters_after)}"
            flops = f"FLOPs/token {change(block.flops_per_token_before, block.flops_per_token_after)}"
            screen.paragraph("", f"{figures}, {flops}", column=2)
            if block.relative_error is not None:
                exact = "keeps the function" if block.exact else "changes the function by design"
                screen.paragraph("", f"relative error {error(block.relative_error)}, {exact}", column=2)
            if block.all_on_error is not None:
                screen.paragraph("", f"relative error with all experts on {error(block.all_on_error)}", column=2)
        else:
            screen.paragraph("", f"left dense: {block.reason}", column=2)
        for note in block.notes:
            screen.paragraph("", f"note: {note}", column=2)


def near_misses(screen: Screen, report: Report) -> None:
    """The places that look like a feed-forward block and are not, those alike in one entry."""
    screen.line()
    screen.line(f"near misses: {len(report.near_misses)}", "bold")
    for path, miss in _folded(report.near_misses):
        source = f" ({miss['source']})" if miss.get("source") else ""
        screen.line(f"  {path}")
        screen.paragraph("", f"{miss['reason']}{source}", column=6)


def facts(screen: Screen, report: Report, *, hint: str | None) -> None:
    """Inputs, sizes, notes and near misses; ``hint`` is the command that shows them."""
    screen.line()
    if report.inputs:
        screen.paragraph("inputs", "; ".join(report.inputs), column=COLUMN)
    made = sorted({_made_by(block) for block in report.blocks if block.converted})
    if len(made) == 1:
        screen.paragraph("made by", f"{made[0]}, seed {report.recipe.get('seed', 0)}", column=COLUMN)
    if any(block.converted for block in report.blocks):
        screen.paragraph(
            "parameters", change(report.parameters_before, report.parameters_after) + " in all", column=COLUMN
        )
    # Experts as wide as the FFN are whole ones: top-k says how many.
    cut = [b.active_share for b in report.blocks if b.active_share is not None and b.d_expert != b.d_ff]
    if cut:
        active = _span([100 * share for share in cut], "{:.3g}%", "of an FFN's hidden units for each token")
        screen.paragraph("active", active, column=COLUMN)
    for note in report.notes:
        screen.paragraph("note", note, column=COLUMN)
    if report.near_misses and hint:
        count = len(report.near_misses)
        places = "1 place looks" if count == 1 else f"{count} places look"
        screen.paragraph("near misses", f"{places} like a feed-forward block but cannot be one", column=COLUMN)
        screen.line(" " * COLUMN + hint)


def fit(screen: Screen, report: Report) -> None:
    """What fitting split blocks to the data gave, where that was done."""
    fitted = [block for block in report.blocks if block.rms_error is not None]
    if not fitted:
        return
    rows = " ".join(
        _span([getattr(block, name) for block in fitted], "{:d}", word)
        for name, word in (("fitted_rows", "rows, measured on"), ("held_out_rows", "others"))
    )
    before = _span([block.rms_error for block in fitted], "{:.3f}", "routed")
    parts = [f"on {rows}: rms error {before}"]
    repaired = [b for b in fitted if b.repaired_rms_error is not None]
    if repaired:
        after = [b.repaired_rms_error if b.repaired else b.rms_error for b in repaired]
        parts.append(f"{_span(after, '{:.3f}', 'repaired')}")
        left = sum(not block.repaired for block in repaired)
        if left:
            parts[-1] += f" ({left} left as they were, where it did not help)"
    parts.append(_span([b.router_agreement for b in fitted], "{:.0%}", "of the choices are the best"))
    parts.append("loads vary by " + _span([b.load_cv for b in fitted], "{:.2f}", "of their mean"))
    screen.paragraph("fitted", ", ".join(parts), column=COLUMN)


def proof(screen: Screen, report: Report) -> None:
    """What was measured against the dense model."""
    converted = [block for block in report.blocks if block.converted]
    exact = [b.relative_error for b in converted if b.exact and b.relative_error is not None]
    changed = [b.relative_error for b in converted if not b.exact and b.relative_error is not None]
    fitted = " on data it was fitted to" if report.model_error_on_fitted_data else ""
    whole = f"whole model {error(report.model_relative_error)}{fitted}"
    if not exact and not changed:
        screen.paragraph("verified", "no: nothing has been measured", column=COLUMN)
        return
    parts = []
    if exact:
        which = "every block" if not changed else f"{len(exact)} of {len(converted)} blocks"
        parts.append(f"{which} within {report.tolerance:.0e} (largest {error(max(exact))})")
    if changed:
        blocks = "every block" if not exact else f"{len(changed)} block{'s' * (len(changed) > 1)}"
        parts.append(f"{blocks} changed by design (largest {error(max(changed))})")
    text = ", ".join([*parts, whole])
    all_on = [b.all_on_error for b in converted if b.all_on_error is not None]
    if all_on:
        text += f"; all experts on: within {report.tolerance:.0e} (largest {error(max(all_on))})"
    head = ("verified" if not changed else "measured") if report.verified else "not verified"
    screen.paragraph(head, text, column=COLUMN, style="bold")


def passes_table(screen: Screen, report: Report) -> None:
    """Seconds per pass."""
    rows = [(str(entry["text"]), f"{entry['seconds']:.3f} s") for entry in report.passes]
    rows.append(("all passes", f"{sum(entry['seconds'] for entry in report.passes):.3f} s"))
    screen.line()
    for number, line in enumerate(table(("pass", "time"), rows, screen.width)):
        screen.line(line, "bold" if number == 0 else None)


def _span(values: Sequence[Any], form: str, what: str) -> str:
    """``0.12 to 0.31 repaired``."""
    ends = list(dict.fromkeys(form.format(value) for value in (min(values), max(values))))
    return f"{' to '.join(ends)} {what}"


def _alike(blocks: Sequence[BlockReport]) -> list[list[BlockReport]]:
    """Blocks that differ by a number in their path and by what was measured only."""
    same: dict[str, list[BlockReport]] = {}
    blank: dict[str, Any] = dict.fromkeys((*_MEASURED, "source")) | {"path": "", "anchor": "", "notes": []}
    for block in blocks:
        figures = dataclasses.replace(block, **blank)
        same.setdefault(repr(figures), []).append(block)
    groups = [[m[i] for i in group] for m in same.values() for group in group_paths([b.path for b in m])]
    order = {id(block): position for position, block in enumerate(blocks)}
    return sorted(groups, key=lambda group: order[id(group[0])])


def _row(group: list[BlockReport], one_kind: bool) -> tuple[str, ...]:
    first = group[0]
    errors = [block.relative_error for block in group if block.relative_error is not None]
    return (
        _label([block.path for block in group]),
        _shape(first),
        _activation(first),
        _experts(first),
        change(first.parameters_before, first.parameters_after),
        change(first.flops_per_token_before, first.flops_per_token_after),
        error(max(errors) if errors else None),
        "" if one_kind else _made_by(first),
    )


def _left_dense(screen: Screen, blocks: Sequence[BlockReport]) -> None:
    if not blocks:
        return
    screen.line()
    screen.line("  left dense", "bold")
    for path, entry in _folded([{"path": block.path, "reason": block.reason} for block in blocks]):
        screen.line(f"  {path}")
        screen.paragraph("", str(entry["reason"]), column=6)


def _folded(entries: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Entries with the same reason whose paths fold, with the label of their paths."""
    same: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        same.setdefault(str(entry.get("reason")), []).append(entry)
    folded = []
    for members in same.values():
        for group in group_paths([entry["path"] for entry in members]):
            folded.append((_label([members[i]["path"] for i in group]), members[group[0]]))
    return folded


def _label(paths: list[str]) -> str:
    text = label(paths) or "(model)"
    return f"{text}  x{len(paths)}" if len(paths) > 1 else text


def _shape(block: BlockReport) -> str:
    return f"{block.d_model}->{block.d_ff}"


def _activation(block: BlockReport) -> str:
    return f"gated {block.activation}" if block.gated else block.activation


def _experts(block: BlockReport) -> str:
    return f"{block.experts}x{block.d_expert} top-{block.top_k}"


def _made_by(block: BlockReport) -> str:
    return f"{block.method}, {block.router}" + (f", {block.shared} shared" if block.shared else "")
