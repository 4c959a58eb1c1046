"""A Plan and a Calibration on the screen: every number with its source beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.cli.figures import count, error, table
from moeify.cli.output import Screen
from moeify.distributed.labels import MEANING, Figure
from moeify.ir.views.labels import label

if TYPE_CHECKING:
    from moeify.distributed.block_plan import BlockPlan
    from moeify.distributed.calibration import Calibration
    from moeify.distributed.plan import Plan

COLUMN = 13
_WORDS = {
    "parameters": "parameters",
    "active_parameters": "parameters a token goes through",
    "flops_per_token": "FLOPs per token",
    "weights_per_rank": "weights per rank",
    "training_state_per_rank": "weights, gradients, AdamW per rank",
    "exchange_buffers_per_rank": "exchange buffers per rank",
    "rows_per_expert": "rows per expert, mean",
    "bytes_per_token": "bytes leaving a rank per token",
    "exchange_flat": "exchange, flat",
    "exchange_hierarchical": "exchange, hierarchical",
    "exchange_deduplicated": "exchange, deduplicated",
    "compute": "compute",
    "exchange_over_compute": "best exchange / compute",
    "imbalance": "imbalance (fullest rank / mean)",
    "imbalance_placed": "imbalance, experts placed",
    "imbalance_with_copies": "imbalance, with copies",
    "drop_share": "dropped rows",
    "token_budget": "tokens per rank, at least",
    "memory_per_rank": "memory per rank",
    "tokens_that_fit": "tokens per rank, at most",
    "intra_latency": "latency in a node",
    "intra_bandwidth": "bandwidth in a node",
    "latency": "latency between nodes",
    "bandwidth": "bandwidth between nodes",
    "peak": "peak",
    "memory_bandwidth": "memory bandwidth",
    "memory": "memory per rank",
}
_SHARES = ("drop_share",)


def show(screen: Screen, plan: Plan) -> None:
    """All of it."""
    nodes = -(-plan.devices // int(plan.per_node.value))
    per_node = f", {nodes} nodes of {plan.per_node.value:g}" if nodes > 1 else ", one node"
    groups = f"{plan.expert_ranks} ranks share the experts, {plan.replicas} replicas"
    screen.line(f"{plan.model}: {plan.devices} ranks{per_node}; {groups}; {plan.mode}", "bold")
    screen.line(f"  {amount(plan.tokens)} tokens a rank and step ({plan.tokens.source})")
    for block in plan.blocks:
        _block(screen, block, plan.training)
    step = "forward and backward" if plan.training else "forward"
    _section(screen, f"whole model, {step}", ("", "", "source"), _rows(plan.whole))
    _section(screen, "the machine", ("", "", "source"), _rows(plan.machine))
    _scaling(screen, plan, step)
    _effective(screen, plan.effective)
    screen.line()
    for source, meaning in MEANING.items():
        screen.paragraph(source, meaning, column=COLUMN)
    for note in plan.notes:
        screen.paragraph("note", note, column=COLUMN)


def placed(screen: Screen, plan: Plan, output: Path | None) -> None:
    """What placing the experts did to each block."""
    if output is None:
        return
    rows = [(one.path, amount(one.before), amount(one.after), one.after.source) for one in plan.placed]
    _section(screen, "experts placed, imbalance on these loads", ("block", "before", "after", "source"), rows)
    screen.paragraph("wrote", str(output), column=COLUMN, style="bold")


def calibration(screen: Screen, made: Calibration) -> None:
    """The points of the fit, and what it gave."""
    screen.line(f"all-to-all over {made.where}", "bold")
    rows = [
        (_with_prefix(n, "B"), seconds(measured), seconds(fitted), error(abs(fitted / measured - 1.0)))
        for n, measured, fitted in made.points
    ]
    _section(screen, "", ("leaving a rank", "measured", "fitted", "error"), rows)
    found = {name: getattr(made.machine, name) for name in _WORDS if hasattr(made.machine, name)}
    _section(screen, "", ("", "", "source"), _rows({n: f for n, f in found.items() if f.source != "assumed"}))


def amount(figure: Figure, name: str = "") -> str:
    """``28.7 kB``, ``1.42 ms``, ``4.74M``, ``1.34``."""
    value, unit = figure.value, figure.unit
    if unit == "s":
        return seconds(value)
    if name in _SHARES:
        return f"{100 * value:.2f} %"
    if unit in ("tokens", "rows", "ranks"):
        return f"{round(value):,}"
    if unit:
        return _with_prefix(value, unit)
    return count(round(value)) if name.endswith("parameters") else f"{value:.3f}"


def _with_prefix(value: float, unit: str) -> str:
    """``28.7 kB``, ``989 TFLOP/s``."""
    text = count(round(value))
    return f"{text} {unit}" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}{unit}"


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def _block(screen: Screen, block: BlockPlan, training: bool) -> None:
    many = f"  x{len(block.paths)}" if len(block.paths) > 1 else ""
    calls = f", {block.calls} calls" if block.calls > 1 else ""
    shape = f"width {block.d_model}, {block.experts} experts of {block.d_expert}, top-{block.top_k}{calls}"
    rows = []
    for name, figure in block.forward.items():
        back = block.backward.get(name) if training else None
        rows.append((_WORDS[name], amount(figure, name), amount(back, name) if back else "", figure.source))
    title = f"{label(block.paths) or '(model)'}{many}: {shape}"
    _section(screen, title, ("", "forward", "backward", "source"), rows)


def _rows(figures: Mapping[str, Figure]) -> list[tuple[str, ...]]:
    return [(_WORDS[name], amount(figure, name), figure.source) for name, figure in figures.items()]


def _scaling(screen: Screen, plan: Plan, step: str) -> None:
    rows = [
        (
            str(point.ranks),
            str(point.expert_ranks),
            count(round(point.rows_per_expert.value)),
            f"{point.imbalance.value:.3f}",
            seconds(point.exchange_flat.value),
            seconds(point.exchange_hierarchical.value),
            seconds(point.exchange_deduplicated.value),
            seconds(point.compute.value),
            f"{100 * point.efficiency.value:.0f} %",
            point.efficiency.source,
        )
        for point in plan.scaling
    ]
    header = ("ranks", "share", "rows", "imbalance", "flat", "hier.", "dedup.", "compute", "efficient", "source")
    _section(screen, f"scaling, {step}: simulated routing, modelled times", header, rows)


def _effective(screen: Screen, found: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (str(one["routing"]), amount(one["dense"], "parameters"), amount(one["effective"], "parameters"),
         one["effective"].source)
        for one in found
    ]  # fmt: skip
    title = f"effective parameters with {found[0]['experts'].value} experts (arXiv 2202.01169)"
    _section(screen, title, ("routing", "dense", "effective", "source"), rows)
    screen.paragraph("", f"The law is {found[0]['caveat']}.", column=2)
    beyond = [str(one["routing"]) for one in found if one["dense"].value > one["cutoff"].value]
    if beyond:
        screen.paragraph("", f"The model is past the size from which {', '.join(beyond)} gives nothing.", column=2)


def _section(screen: Screen, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    screen.line()
    if title:
        screen.line(title, "bold")
    lines = table(header, rows, screen.width)
    heads = len(lines) // (len(rows) + 1)
    for number, line in enumerate(lines):
        screen.line(line, "dim" if number < heads else None)
