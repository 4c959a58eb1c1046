"""The native kernel on the CPU, one block of D=768, by itself, with 1 and 2 threads: its time over the floor, beside
`com.microsoft.MoE` and `split`, for N from 1 to 2048 tokens.

Three shapes of the same parameters, those of a dense FFN of 1536: 8 experts of 384 (2 active), 16 of 192 (4) and 64 of
48 (16). The floor is ``max(FLOPs / peak, float32 bytes of the experts touched / bandwidth)``, peaks measured for the
number of threads beside each table. All calls of a row take their turns in one process.

Bars, for each number of threads, geometric means over the grid: float32 at most 1.25 x the floor and nowhere above
1.6 x; float16 at most 0.65 x the float32 floor for N <= 16, int8 0.45 x for N <= 4; `com.microsoft.MoE` at least twice
the time of float32 for N >= 16. Errors against float64: float32 2e-6 of the largest value, float16 5e-4 (rms).

``--json`` prints one object; ``--threads 1`` and ``--tokens 1,16`` measure a part, without a verdict.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads spin after a call, in the way of the others

import numpy
import torch
from rich.console import Console
from rich.table import Table

from moeify.backends.onnxruntime import contrib, cost, kernel, kernel_build, measure, split
from moeify.backends.onnxruntime.lowering import Lowering
from moeify.backends.onnxruntime.mixture import Mixture
from moeify.backends.onnxruntime.session import Session
from moeify.backends.roofline import Shape

D = 768
GRID = {
    "8 x 384, top-2": Shape(8, D, 384, D, 2),
    "16 x 192, top-4": Shape(16, D, 192, D, 4),
    "64 x 48, top-16": Shape(64, D, 48, D, 16),
}
TOKENS = (1, 4, 16, 64, 128, 512, 2048)
THREADS = (1, 2)
STORAGES = ("float32", "float16", "int8")
LOWERINGS: dict[str, Lowering] = {
    **{name: functools.partial(kernel.lower, storage=name) for name in STORAGES},
    cost.SPLIT: split.lower,
    cost.CONTRIB: contrib.lower,
}
# Title, of which lowering, from and up to how many tokens, and the most it may be.
BARS = (
    ("float32 / floor", "float32", 1, 2048, 1.25),
    ("float16 / float32 floor, N <= 16", "float16", 1, 16, 0.65),
    ("int8 / float32 floor, N <= 4", "int8", 1, 4, 0.45),
)
BAR_WORST, BAR_SPEED_UP, SPEED_UP_FROM = 1.6, 2.0, 16
BAR_FLOAT32, BAR_FLOAT16 = 2e-6, 5e-4
Row = dict[str, Any]


def peaks(threads: int) -> tuple[float, float]:
    """FLOP/s and bytes/s on so many threads."""
    torch.set_num_threads(threads)
    return measure.peak_flops(), measure.peak_bandwidth()


def sweep(name: str, threads: int, tokens: Sequence[int]) -> list[Row]:
    """A row for each number of tokens and lowering."""
    shape = GRID[name]
    mixture = measure.synthetic(shape, activation="gelu_tanh")
    rows = []
    with measure.Sessions(threads) as sessions:
        opened = {how: sessions.open(measure.block_model(mixture, lower)) for how, lower in LOWERINGS.items()}
        for n in tokens:
            flops, bandwidth = peaks(threads)
            floor = cost.floor(shape, False, n, flops=flops, bandwidth=bandwidth)
            taken = measure.interleaved({how: runner(session, mixture, n) for how, session in opened.items()})
            rows += [
                {
                    "grid": name,
                    "threads": threads,
                    "tokens": n,
                    "lowering": how,
                    "median_ms": 1e3 * statistics.median(seconds),
                    "over_floor": statistics.median(seconds) / floor,
                    "contrib_over_this": measure.ratio(taken, cost.CONTRIB, how),
                    "peak_gflops": flops / 1e9,
                    "peak_gbytes": bandwidth / 1e9,
                }
                for how, seconds in taken.items()
            ]
    return rows


def runner(session: Session, mixture: Mixture, tokens: int) -> Callable[[], Any]:
    """Runs a session on inputs and an output that are bound, as a server would: reading them anew takes a tenth of a
    millisecond of Python, which is what one token takes.
    """
    given = measure.block_inputs(mixture.shape, tokens, mixture.dtype)
    y = numpy.empty((tokens, mixture.shape.d_out), numpy.float32)
    bound = session.bind({name: given[name] for name in session.input_names}, {"y": y})
    return lambda: session._session.run_with_iobinding(bound._binding)  # ``bound`` keeps the arrays


def errors() -> dict[str, float]:
    """Of each storage on 64 tokens: the largest error over the largest value, and the rms error over the rms."""
    mixture = measure.synthetic(GRID["8 x 384, top-2"], activation="gelu_tanh")
    given = measure.block_inputs(mixture.shape, 64, mixture.dtype)
    wanted = _plain(mixture, given)
    found = {}
    with measure.Sessions(threads=1) as sessions:
        for name in STORAGES:
            session = sessions.open(measure.block_model(mixture, LOWERINGS[name]))
            error = session.run(given)[0] - wanted
            found[f"{name} max"] = float(abs(error).max() / abs(wanted).max())
            found[f"{name} rms"] = float(numpy.sqrt((error**2).mean() / (wanted**2).mean()))
    return found


def _plain(mixture: Mixture, given: dict[str, numpy.ndarray]) -> numpy.ndarray:
    wide = {role: torch.from_numpy(mixture.array(role)).double() for role in mixture.stacked}
    x, weights = torch.from_numpy(given["x"]).double(), torch.from_numpy(given["weights"]).double()
    y = torch.zeros(len(x), mixture.shape.d_out, dtype=torch.double)
    for e in range(mixture.shape.num_experts):
        hidden = torch.nn.functional.gelu(x @ wide["up"][e].T + wide["up_bias"][e], approximate="tanh")
        weight = (weights * (torch.from_numpy(given["experts"]) == e)).sum(1, keepdim=True)
        y += weight * (hidden @ wide["down"][e].T + wide["down_bias"][e])
    return y.numpy()


def verdicts(rows: list[Row], threads: int) -> list[tuple[str, float, float, bool]]:
    """Title, value, bar and whether it is held, for one number of threads."""
    mine = [row for row in rows if row["threads"] == threads]

    def values(key: str, lowering: str, least: int, most: int) -> list[float]:
        return [row[key] for row in mine if row["lowering"] == lowering and least <= row["tokens"] <= most]

    found = []
    for title, lowering, least, most, bar in BARS:
        mean = statistics.geometric_mean(values("over_floor", lowering, least, most))
        found.append((title, mean, bar, mean <= bar))
    worst = max(values("over_floor", "float32", 1, max(TOKENS)))
    found.append(("float32 / floor, worst", worst, BAR_WORST, worst <= BAR_WORST))
    gain = statistics.geometric_mean(values("contrib_over_this", "float32", SPEED_UP_FROM, max(TOKENS)))
    found.append((f"{cost.CONTRIB} / float32, N >= {SPEED_UP_FROM}", gain, BAR_SPEED_UP, gain >= BAR_SPEED_UP))
    return [(f"{title}, {threads} thread{'s' * (threads > 1)}", *rest) for title, *rest in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, choices=THREADS)
    parser.add_argument("--tokens", type=lambda text: tuple(int(n) for n in text.split(",")))
    asked = parser.parse_args()
    kernel_build.build()
    threads = (asked.threads,) if asked.threads else THREADS
    tokens = asked.tokens or TOKENS
    off = errors()
    rows = []
    for count in threads:
        for name in GRID:
            rows += sweep(name, count, tokens)
            if not asked.json:
                show(name, count, rows)
    whole = tokens == TOKENS and threads == THREADS
    found = [verdict for count in threads for verdict in verdicts(rows, count)] if whole else []
    found.append(("float32 error, max", off["float32 max"], BAR_FLOAT32, off["float32 max"] <= BAR_FLOAT32))
    found.append(("float16 error, rms", off["float16 rms"], BAR_FLOAT16, off["float16 rms"] <= BAR_FLOAT16))
    held = all(verdict[3] for verdict in found)
    if asked.json:
        bars = [dict(zip(("what", "value", "bar", "held"), verdict)) for verdict in found]
        print(json.dumps({"isa": kernel_build.isa(), "held": held, "bars": bars, "errors": off, "rows": rows}))
    else:
        for title, value, bar, fine in found:
            print(f"{title}: {value:.3g} (bar {bar:g}): {'held' if fine else 'MISSED'}")
        print("errors: " + ", ".join(f"{name} {value:.1e}" for name, value in off.items()))
    return 0 if held else 1


def show(name: str, threads: int, rows: list[Row]) -> None:
    mine = [row for row in rows if row["grid"] == name and row["threads"] == threads]
    peak, stream = (max(row[key] for row in mine) for key in ("peak_gflops", "peak_gbytes"))
    table = Table(
        title=f"{name}, threads: {threads}, {kernel_build.isa()}: time over the float32 floor",
        caption=f"machine: {peak:.0f} GFLOP/s, {stream:.1f} GB/s",
    )
    for heading in ("tokens", "float32", *LOWERINGS, "MoE / float32"):
        table.add_column(heading.removeprefix("com.microsoft."), justify="right", no_wrap=True)
    for n in dict.fromkeys(row["tokens"] for row in mine):
        at = {row["lowering"]: row for row in mine if row["tokens"] == n}
        over = [f"{at[how]['over_floor']:.2f}" for how in LOWERINGS]
        one = at["float32"]
        table.add_row(str(n), f"{one['median_ms']:.3f} ms", *over, f"{one['contrib_over_this']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
