"""One block on the CPU, 2 threads, float32, D=768: TVM over the floor and beside ONNX Runtime, N from 1 to 512.

8 experts of 384 or 3072 hidden units, 1 or 2 of them for each token; the floor is that of ``bench_onnx``; every call
of a row takes its turn in one process. The same kernels with weights stored in bfloat16 stand beside them.

Bars: TVM takes at most 1.5 x the floor, and `com.microsoft.MoE` at least 1.5 x the time of TVM (geometric means over
the grid).

``--json`` prints one object.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads spin after a call, in the way of the others

import torch
import tvm
from rich.console import Console
from rich.table import Table
from tvm import relax, tirx

from bench.bench_onnx import D_FF, D
from moeify.backends.onnxruntime import contrib, cost, dense, measure, split
from moeify.backends.onnxruntime.mixture import ROLES, Mixture
from moeify.backends.roofline import Shape
from moeify.backends.tvm import threads
from moeify.backends.tvm.cpu import pipeline
from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.emitter import Emitter
from moeify.backends.tvm.families import Experts
from moeify.backends.tvm.machine import machine
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weights

THREADS = 2
TVM, STORED = "tvm", "tvm, bfloat16"
GRID = {f"8 x {width}, top-{k}": Shape(8, D, width, D, k) for width in (384, 3072) for k in (1, 2)}
TOKENS = (1, 4, 16, 64, 128, 512)
BAR_FLOOR, BAR_SPEED_UP = 1.5, 1.5
Row = dict[str, Any]


def compiled(mixture: Mixture, expert_dtype: torch.dtype = torch.float32) -> Callable[[int], Callable[[], Any]]:
    """The block in TVM: a number of tokens to a call on the inputs that ONNX Runtime's runner takes for it."""
    shape, native = mixture.shape, machine()
    weights = Weights(lambda role: torch.from_numpy(mixture.array(role)))
    up, gate, down, *biases = (role if role in mixture.stacked else None for role in ROLES)
    assert up is not None
    assert down is not None
    spec = Experts(
        up, gate, down, *biases, mixture.activation, shape.num_experts, shape.d_model, shape.d_expert, shape.d_out
    )
    tokens = tirx.Var("tokens", "int64")
    x = relax.Var("x", tensor_type((tokens, shape.d_model), "float32"))
    experts = relax.Var("experts", tensor_type((tokens, shape.top_k), "int64"))
    chosen = relax.Var("weights", tensor_type((tokens, shape.top_k), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main"):
        with builder.dataflow():
            emitter = Emitter(builder, native, weights)
            y = builder.emit_output(table(expert_dtype)("dispatch_ffn", emitter, x, experts, chosen, spec))
        builder.emit_func_output(y, [x, experts, chosen, *[weight.var for weight in weights]])
    main = relax.VirtualMachine(pipeline.compile(builder.get(), native), tvm.cpu())["main"]
    packed = [tvm.runtime.from_dlpack(weight.value()) for weight in weights]

    def runner(n: int) -> Callable[[], Any]:
        data = measure.block_inputs(shape, n, mixture.dtype)
        inputs = [tvm.runtime.from_dlpack(torch.tensor(data[name])) for name in ("x", "experts", "weights")]
        return lambda: main(*inputs, *packed)

    return runner


def sweep(name: str, peaks: tuple[float, float]) -> list[Row]:
    """A row for each number of tokens and way to compute them."""
    shape = GRID[name]
    mixture = measure.synthetic(shape, activation="gelu_tanh")
    lowerings = {
        cost.DENSE: functools.partial(dense.lower, d_ff=D_FF),
        cost.SPLIT: split.lower,
        cost.CONTRIB: contrib.lower,
    }
    tvm_runner, stored = compiled(mixture), compiled(mixture, torch.bfloat16)
    rows = []
    with measure.Sessions(THREADS) as sessions:
        opened = {key: sessions.open(measure.block_model(mixture, lower)) for key, lower in lowerings.items()}
        for n in TOKENS:
            calls = {key: measure.runner(session, mixture, n) for key, session in opened.items()}
            taken = measure.interleaved({TVM: tvm_runner(n), STORED: stored(n), **calls})
            floor = cost.floor(shape, False, n, flops=peaks[0], bandwidth=peaks[1])
            rows.append(
                {
                    "grid": name,
                    "tokens": n,
                    "median_ms": {key: 1e3 * statistics.median(seconds) for key, seconds in taken.items()},
                    "over_floor": statistics.median(taken[TVM]) / floor,
                    "over_tvm": {key: measure.ratio(taken, key, TVM) for key in (STORED, *lowerings)},
                }
            )
    return rows


def main() -> int:
    threads.prepare()
    threads.use(THREADS)
    torch.set_num_threads(THREADS)
    peaks = measure.peak_flops(), measure.peak_bandwidth()
    rows = [row for name in GRID for row in sweep(name, peaks)]
    over_floor = statistics.geometric_mean(row["over_floor"] for row in rows)
    speed_up = statistics.geometric_mean(row["over_tvm"][cost.CONTRIB] for row in rows)
    result: dict[str, Any] = {
        "peak_gflops": round(peaks[0] / 1e9, 1),
        "peak_gbytes": round(peaks[1] / 1e9, 1),
        "tvm_over_floor": round(over_floor, 3),
        "contrib_over_tvm": round(speed_up, 3),
        "split_over_tvm": round(statistics.geometric_mean(row["over_tvm"][cost.SPLIT] for row in rows), 3),
        "bars": {"tvm_over_floor": BAR_FLOOR, "contrib_over_tvm": BAR_SPEED_UP},
        "held": over_floor <= BAR_FLOOR and speed_up >= BAR_SPEED_UP,
    }
    if "--json" in sys.argv:
        print(json.dumps({**result, "rows": rows}))
    else:
        for name in GRID:
            show(name, [row for row in rows if row["grid"] == name])
        Console().print(
            f"machine: {result['peak_gflops']} GFLOP/s, {result['peak_gbytes']} GB/s\n"
            f"TVM over floor {result['tvm_over_floor']} (bar {BAR_FLOOR}); {cost.CONTRIB} over TVM "
            f"{result['contrib_over_tvm']} (bar {BAR_SPEED_UP}); split over TVM {result['split_over_tvm']}: "
            f"{'held' if result['held'] else 'MISSED'}"
        )
    return 0 if result["held"] else 1


def show(name: str, rows: list[Row]) -> None:
    grid = Table(title=f"{name}, D={D}, float32, {THREADS} threads")
    others = (STORED, cost.SPLIT, cost.CONTRIB, cost.DENSE)
    for column in ("tokens", "tvm", "/ floor", *(f"{other} / tvm" for other in others)):
        grid.add_column(column, justify="right")
    for row in rows:
        cells = [str(row["tokens"]), f"{row['median_ms'][TVM]:.2f} ms", f"{row['over_floor']:.2f}"]
        grid.add_row(*cells, *(f"{row['over_tvm'][other]:.2f}" for other in others))
    Console().print(grid)


if __name__ == "__main__":
    sys.exit(main())
