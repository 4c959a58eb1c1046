"""The plot of ``moeify train``: the losses of the steps, and the held-out figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeify.cli.plots import save

if TYPE_CHECKING:
    from moeify.api.train_report import TrainReport


def draw(report: TrainReport, path: Path) -> None:
    """Write the plot whole or not at all; ``plots.check`` has looked at the path. Raises OutputNotWritten."""
    from matplotlib.figure import Figure  # without pyplot: no display and no state

    run = report.run
    steps = range(run.first + 1, run.steps + 1)
    held_out = [(one.step, one.loss) for one in report.held_out if one.loss is not None]
    teacher = [
        (one.step, output.divergence if output.divergence is not None else output.rms_error)
        for one in report.held_out
        for output in one.against_teacher[:1]
    ]
    panels = 2 if teacher else 1
    figure = Figure(figsize=(5.5 * panels, 3.6), layout="constrained")
    losses, *more = figure.subplots(1, panels, squeeze=False)[0]
    losses.plot(steps, run.losses, linewidth=0.8, label=report.loss_is)
    for name, values in run.router_losses.items():
        losses.plot(steps, values, linewidth=0.8, label=f"{name} loss")
    if run.consistency:
        losses.plot(steps, run.consistency, linewidth=0.8, label="consistency, nats")
    if held_out:
        losses.plot(*zip(*held_out), "o-", label="held out: loss of the task")
    losses.set_ylabel("loss")
    losses.legend()
    for axes in more:
        first = report.held_out[0].against_teacher[0]
        axes.plot(*zip(*teacher), "o-")
        axes.set_ylabel(
            f"{first.name}: " + ("KL to the teacher, nats" if first.divergence is not None else "rms error")
        )
        axes.set_ylim(bottom=0)
    for axes in (losses, *more):
        axes.set_xlabel("steps")
    figure.suptitle(Path(report.model).name)
    save(figure, path, dpi=100)
