"""The plot of ``moeify bench``: time over the dense model by number of tokens, one panel a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.cli.plots import save

if TYPE_CHECKING:
    from moeify.api.bench import Row

_STYLE = {"torch": "--", "onnxruntime": "-", "tvm": "-."}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot whole or not at all. Models without a dense twin are drawn over their floor.

    Raises OutputNotWritten.
    """
    from matplotlib.figure import Figure  # without pyplot: no display and no state

    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(5.5 * max(len(models), 1), 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, max(len(models), 1), squeeze=False)[0], models):
        mine = [row for row in rows if row.model == model]
        over_dense = all(row.ratio_to_dense is not None for row in mine)
        for runtime, lowering in dict.fromkeys((row.runtime, row.lowering) for row in mine):
            line = [row for row in mine if (row.runtime, row.lowering) == (runtime, lowering)]
            if over_dense and lowering == "dense":
                continue
            values = [row.ratio_to_dense if over_dense else row.ratio_to_floor for row in line]
            tokens = [row.tokens for row in line]
            axes.plot(tokens, values, _STYLE.get(runtime, "-"), marker="o", label=f"{runtime} {lowering}")
        if over_dense:
            axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row.tokens for row in mine}), [str(n) for n in sorted({row.tokens for row in mine})])
        axes.set_ylim(bottom=0)
        axes.set_title(model)
        axes.set_xlabel("tokens")
        axes.set_ylabel("time / dense, same runtime" if over_dense else "time / floor")
        axes.legend()
    save(figure, path)
