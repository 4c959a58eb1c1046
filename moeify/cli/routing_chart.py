"""The plot of ``moeify inspect --routing``: loads by block and expert, agreement between blocks, experts by label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.cli.label_summary import clearest, with_labels
from moeify.cli.plots import save

if TYPE_CHECKING:
    from moeify.training.routing_report import RoutingReport


def draw(report: RoutingReport, path: Path, classes: Sequence[str] = ()) -> None:
    """Write the plot whole or not at all; ``plots.check`` has looked at the path. ``classes`` are the names of the
    labels. Raises OutputNotWritten."""
    from matplotlib.figure import Figure  # without pyplot: no display and no state

    count = len(report.blocks)
    most = max(len(block.load) for block in report.blocks)
    nan = float("nan")
    loads = [[share * len(b.load) for share in b.load] + [nan] * (most - len(b.load)) for b in report.blocks]
    together = [[nan if value is None else value for value in row] for row in report.agreement]
    told = with_labels(report.blocks)
    shown = clearest(told) if told else report.blocks[0]
    by_label = shown.label_loads or {}
    high = max(3.0, 0.3 * count + 1.5, 0.2 * len(by_label) + 1.5)
    figure = Figure(figsize=(16 if by_label else 11, high), layout="constrained")
    left, right, *more = figure.subplots(1, 3 if by_label else 2)
    for axes, values, top, title in (
        (left, loads, 2.0, "load over the mean"),
        (right, together, 1.0, "agreement of blocks (normalised mutual information)"),
    ):
        _heat_map(axes, values, top, title, [block.path or "(the model)" for block in report.blocks])
    for axes in more:
        values = [[share * len(loads) for share in loads] for loads in by_label.values()]
        title = f"load over the mean by label in {shown.path or '(the model)'}"
        _heat_map(axes, values, 2.0, title, [classes[label] if classes else str(label) for label in by_label])
        axes.set_xlabel("expert")
    left.set_xlabel("expert")
    right.set_xlabel("block")
    save(figure, path)


def _heat_map(axes: Any, values: list[list[float]], top: float, title: str, names: Sequence[str]) -> None:
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes)
    axes.set_title(title)
    axes.set_yticks(range(len(names)), names, fontsize=7)
