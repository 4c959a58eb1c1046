"""The plot of ``moeify inspect --routing``: loads by block and expert, and agreement between blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeify.cli.plots import save

if TYPE_CHECKING:
    from moeify.training.routing_report import RoutingReport


def draw(report: RoutingReport, path: Path) -> None:
    """Write the plot whole or not at all; ``plots.check`` has looked at the path. Raises OutputNotWritten."""
    from matplotlib.figure import Figure  # without pyplot: no display and no state

    count = len(report.blocks)
    most = max(len(block.load) for block in report.blocks)
    nan = float("nan")
    loads = [[share * len(b.load) for share in b.load] + [nan] * (most - len(b.load)) for b in report.blocks]
    together = [[nan if value is None else value for value in row] for row in report.agreement]
    figure = Figure(figsize=(11, max(3.0, 0.3 * count + 1.5)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, top, title in (
        (left, loads, 2.0, "load over the mean"),
        (right, together, 1.0, "agreement of blocks (normalised mutual information)"),
    ):
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=axes)
        axes.set_title(title)
        axes.set_yticks(range(count), [block.path or "(the model)" for block in report.blocks], fontsize=7)
    left.set_xlabel("expert")
    right.set_xlabel("block")
    save(figure, path)
