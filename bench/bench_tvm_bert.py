"""The BERT of bench_bert, sparse, as a library of TVM against ONNX Runtime on the CPU, 2 threads, float32.

Bars: TVM takes at most 1.2 x the time of the faster lowering to ONNX Runtime; compiling the same model with 12 layers
takes at most 3 minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

# Read once, when torch starts: its threads would spin beside the kernels of others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import tvm
from rich.console import Console
from rich.table import Table
from tvm import relax

from bench.bench_bert import LAYERS, THREADS, TOKENS, sparse
from moeify.backends.onnxruntime import candidates, measure
from moeify.backends.tvm import threads
from moeify.backends.tvm.cpu import pipeline
from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.importing import import_graph
from moeify.backends.tvm.lowering import source
from moeify.backends.tvm.machine import machine
from moeify.ir.program import Program

ROUNDS = 25
DEEPER = 12
BAR, COMPILE_BAR = 1.2, 180.0
TVM = "tvm"


class Compiled:
    """The program as a library in this process: the bare call, without the loader's checks of inputs."""

    def __init__(self, program: Program) -> None:
        origin = source(program)
        start = time.perf_counter()
        imported = import_graph(origin.module, origin.inputs, machine("cpu"), table())
        built = pipeline.compile(imported.mod, machine("cpu"))
        self.seconds = time.perf_counter() - start
        self.machine = relax.VirtualMachine(built, tvm.cpu())
        self.weights = [tvm.runtime.from_dlpack(weight.value()) for weight in imported.weights]
        self.main = self.machine["main"]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.from_dlpack(self.main(tvm.runtime.from_dlpack(ids), *self.weights)[0])


def main() -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, of its pytrees
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder, measure.Sessions(THREADS) as sessions:
        program = sparse(Path(folder))
        threads.prepare()
        threads.use(THREADS)
        compiled = Compiled(program)
        compile_seconds = Compiled(sparse(Path(folder), DEEPER)).seconds
        models, _ = candidates.lowered(program)
        runner = candidates.Runner(models, sessions)
        ids = torch.randint(1000, (1, TOKENS))
        calls: dict[str, Any] = {name: lambda name=name: runner.call(name, (ids,)) for name in models}
        calls[TVM] = lambda: compiled(ids)
        taken = measure.interleaved(calls, ROUNDS)
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}
    best = min((name for name in medians if name != TVM), key=lambda name: medians[name])
    over = round(measure.ratio(taken, TVM, best), 3)
    result: dict[str, Any] = {
        "median_ms": {name: round(ms, 2) for name, ms in medians.items()},
        "best": best,
        "over_best": over,
        "bar": BAR,
        "compile_s": round(compile_seconds, 1),
        "compile_bar_s": COMPILE_BAR,
        "held": over <= BAR and compile_seconds <= COMPILE_BAR,
    }
    if "--json" in sys.argv:
        print(json.dumps(result))
    else:
        show(result)
    return 0 if result["held"] else 1


def show(result: dict[str, Any]) -> None:
    table_ = Table(title=f"BERT, {LAYERS} layers, {TOKENS} tokens, 8 x 384 top-2, {THREADS} threads")
    table_.add_column("")
    table_.add_column("median", justify="right")
    for name, milliseconds in result["median_ms"].items():
        table_.add_row(name, f"{milliseconds:.1f} ms")
    Console().print(table_)
    verdict = "held" if result["held"] else "MISSED"
    Console().print(
        f"tvm: {result['over_best']} x {result['best']} (bar {BAR}), "
        f"{DEEPER} layers compiled in {result['compile_s']} s (bar {COMPILE_BAR:.0f} s): {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
