"""One block on the CPU in ONNX Runtime, 2 threads, float32, D=768: each lowering over the floor, N from 1 to 2048.

Two shapes: the parameters of a dense FFN of 3072 dealt out to 8 experts of 384, 2 active; and 8 experts of 3072, 1
active. The floor is ``max(FLOPs / peak, bytes of the experts touched / bandwidth)``, peaks measured in this run.

Bars: `split` takes at most 1.9 x the floor (geometric mean over the grid), and at N >= 16 `com.microsoft.MoE` at least
1.4 x the time of `split` (geometric mean). The dense FFN is reported without a bar.

The ``kernel`` lowering has a benchmark of its own, ``bench_kernel``.

``--fit`` measures a wider grid and prints the constants of ``backends/onnxruntime/cost.py`` for this machine, those of
``kernel`` too where its library is built; ``--json`` prints one object.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import fitting
from moeify.backends.onnxruntime import contrib, cost, dense, kernel, kernel_library, measure, split
from moeify.backends.roofline import Shape

D, D_FF, THREADS = 768, 3072, 2
TOKENS = (1, 4, 16, 64, 128, 512, 2048)
GRID = {
    "same parameters": Shape(8, D, 384, D, 2),
    "full-size experts": Shape(8, D, D_FF, D, 1),
}
# More experts and fewer, wider and narrower: what a cost per expert and per weight is told apart by.
FIT = [
    *GRID.values(),
    Shape(64, D, 48, D, 16),
    Shape(32, D, 384, D, 2),
    Shape(4, D, 768, D, 1),
    Shape(8, 384, 1536, 384, 2),
]
BAR_FLOOR, BAR_SPEED_UP, FROM = 1.9, 1.4, 16
Row = dict[str, Any]


def sweep(
    shape: Shape, peaks: tuple[float, float], tokens: tuple[int, ...] = TOKENS, with_kernel: bool = False
) -> list[Row]:
    """A row for each number of tokens and lowering."""
    mixture = measure.synthetic(shape, activation="gelu_tanh")
    lowerings = {
        cost.DENSE: functools.partial(dense.lower, d_ff=D_FF),
        cost.SPLIT: split.lower,
        cost.CONTRIB: contrib.lower,
        **({cost.KERNEL: kernel.lower} if with_kernel else {}),
    }
    rows = []
    with measure.Sessions(THREADS) as sessions:
        opened = {name: sessions.open(measure.block_model(mixture, lower)) for name, lower in lowerings.items()}
        for n in tokens:
            calls = {name: measure.runner(session, mixture, n) for name, session in opened.items()}
            taken = measure.interleaved(calls)
            for name, seconds in taken.items():
                mine = cost.dense_shape(shape, D_FF) if name == cost.DENSE else shape
                floor = cost.floor(mine, False, n, flops=peaks[0], bandwidth=peaks[1])
                rows.append(
                    {
                        "lowering": name,
                        "tokens": n,
                        "median_ms": 1e3 * statistics.median(seconds),
                        "best": min(seconds),
                        "over_floor": statistics.median(seconds) / floor,
                        "dense_over_this": measure.ratio(taken, cost.DENSE, name),
                        "contrib_over_this": measure.ratio(taken, cost.CONTRIB, name),
                        "shape": mine,
                    }
                )
    return rows


def mean(rows: list[Row], key: str, lowering: str, least: int = 1) -> float:
    """The geometric mean over a lowering's rows of at least so many tokens."""
    return statistics.geometric_mean(r[key] for r in rows if r["lowering"] == lowering and r["tokens"] >= least)


def fit(peaks: tuple[float, float]) -> int:
    """Measure, fit, print."""
    built = kernel_library.is_built()
    rows = [row for shape in FIT for row in sweep(shape, peaks, with_kernel=built)]
    print(f"flops_per_thread: float = {peaks[0] / THREADS:.3g}\nbandwidth: float = {peaks[1]:.3g}")
    for name in dict.fromkeys(row["lowering"] for row in rows):
        points = [(row["shape"], row["tokens"], row["best"]) for row in rows if row["lowering"] == name]
        kernel, error = fitting.fit(cost.MEASURED.kernels[name], points, peaks, THREADS)
        print(f"{name}: {kernel}  # typical error {error:.0%}")
    return 0


def main() -> int:
    torch.set_num_threads(THREADS)
    peaks = measure.peak_flops(), measure.peak_bandwidth()
    if "--fit" in sys.argv:
        return fit(peaks)
    grid = {name: sweep(shape, peaks) for name, shape in GRID.items()}
    everything = [row for rows in grid.values() for row in rows]
    result: dict[str, Any] = {
        "peak_gflops": round(peaks[0] / 1e9, 1),
        "peak_gbytes": round(peaks[1] / 1e9, 1),
        "split_over_floor": round(mean(everything, "over_floor", cost.SPLIT), 3),
        "contrib_over_floor": round(mean(everything, "over_floor", cost.CONTRIB), 3),
        "contrib_over_split": round(mean(everything, "contrib_over_this", cost.SPLIT, FROM), 3),
        "bars": {"split_over_floor": BAR_FLOOR, "contrib_over_split": BAR_SPEED_UP},
        "rows": [{"grid": name, **_plain(row)} for name, rows in grid.items() for row in rows],
    }
    held = result["split_over_floor"] <= BAR_FLOOR and result["contrib_over_split"] >= BAR_SPEED_UP
    result["held"] = held
    if "--json" in sys.argv:
        print(json.dumps(result))
    else:
        for name, rows in grid.items():
            show(f"{name}: {GRID[name].num_experts} x {GRID[name].d_expert}, top-{GRID[name].top_k}", rows)
        Console().print(
            f"machine: {result['peak_gflops']} GFLOP/s, {result['peak_gbytes']} GB/s\n"
            f"split over floor {result['split_over_floor']} (bar {BAR_FLOOR}); {cost.CONTRIB} over split at N >= "
            f"{FROM} {result['contrib_over_split']} (bar {BAR_SPEED_UP}): {'held' if held else 'MISSED'}"
        )
    return 0 if held else 1


def _plain(row: Row) -> Row:
    """Without what is only for the fit, rounded."""
    kept = {key: value for key, value in row.items() if key not in ("shape", "best")}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in kept.items()}


def show(title: str, rows: list[Row]) -> None:
    table = Table(title=f"{title}, D={D}, float32, {THREADS} threads")
    for column in ("tokens", "dense", "split", "/ floor", "dense /", cost.CONTRIB, "/ floor", "dense /"):
        table.add_column(column, justify="right")
    for n in TOKENS:
        at = {row["lowering"]: row for row in rows if row["tokens"] == n}
        cells = [str(n), f"{at[cost.DENSE]['median_ms']:.2f} ms"]
        for name in (cost.SPLIT, cost.CONTRIB):
            row = at[name]
            cells += [f"{row['median_ms']:.2f} ms", f"{row['over_floor']:.2f}", f"{row['dense_over_this']:.2f}"]
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
