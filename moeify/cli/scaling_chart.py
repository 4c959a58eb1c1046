"""The plot of ``moeify plan``: modelled time by number of ranks, as they are and as shares of a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeify.cli.plots import save

if TYPE_CHECKING:
    from moeify.distributed.plan import Plan

_EXCHANGES = ("flat", "hierarchical", "deduplicated")


def draw(plan: Plan, path: Path) -> None:
    """Write the plot whole or not at all; ``plots.check`` has looked at the path. Raises OutputNotWritten."""
    from matplotlib.figure import Figure  # without pyplot: no display and no state

    ranks = [point.ranks for point in plan.scaling]
    figure = Figure(figsize=(11, 4), layout="constrained")
    times, share = figure.subplots(1, 2)
    times.plot(ranks, [1e3 * point.compute.value for point in plan.scaling], "-", marker="o", label="compute")
    for values, names in _exchanges(plan).items():
        times.plot(ranks, values, "--", marker="o", label=f"exchange, {' = '.join(names)}")
    times.set_yscale("log")
    times.set_ylabel("ms of a step, all mixtures, fullest rank")
    times.legend()
    share.plot(ranks, [100 * point.efficiency.value for point in plan.scaling], "-", marker="o", color="black")
    share.set_ylim(0, 100)
    share.set_ylabel("compute / (compute + best exchange), %")
    for axes in (times, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.set_xlabel("ranks")
    source = plan.scaling[0].efficiency.source
    figure.suptitle(f"{Path(plan.model).name}: simulated routing, modelled times, {source} figures")
    save(figure, path)


def _exchanges(plan: Plan) -> dict[tuple[float, ...], list[str]]:
    """Milliseconds at each number of ranks, with the exchanges that take them: within a node all are the same."""
    lines: dict[tuple[float, ...], list[str]] = {}
    for name in _EXCHANGES:
        values = tuple(1e3 * getattr(point, f"exchange_{name}").value for point in plan.scaling)
        lines.setdefault(values, []).append(name)
    return lines
