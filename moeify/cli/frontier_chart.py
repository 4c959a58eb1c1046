"""The plot of ``moeify tune``: what is kept by the work that is left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeify.cli.plots import save

if TYPE_CHECKING:
    from moeify.api.tune_report import TuneReport


def draw(report: TuneReport, path: Path) -> None:
    """Write the plot whole or not at all; ``plots.check`` has looked at the path. Raises OutputNotWritten."""
    from matplotlib.figure import Figure  # without pyplot: no display and no state

    points = report.frontier
    done = [point for point in points if point.quality is not None]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_flops, by_time = figure.subplots(1, 2, sharey=True)
    by_flops.plot(
        [100 * point.flops for point in points], [point.expected_quality for point in points], "-", label="expected"
    )
    by_flops.plot([100 * point.flops for point in done], [point.quality for point in done], "o", label="measured")
    by_flops.set_xlabel("FLOPs of the feed-forward blocks, % of dense")
    by_flops.set_ylabel(report.measure)
    by_time.plot(
        [point.expected_time for point in points], [point.expected_quality for point in points], "-", label="expected"
    )
    timed = [point for point in done if point.measured_time is not None]
    if timed:
        by_time.plot(
            [point.measured_time for point in timed], [point.quality for point in timed], "o", label="measured"
        )
    by_time.set_xlabel(f"time of the model at {report.time_tokens} tokens, dense = 1")
    for axes in (by_flops, by_time):
        if report.goal == "keep":
            axes.axhline(report.target, color="grey", linewidth=0.8)
        axes.legend(loc="lower right")
    figure.suptitle(f"{Path(report.model).name}: {report.goal} {report.target:g}")
    save(figure, path, dpi=100)
