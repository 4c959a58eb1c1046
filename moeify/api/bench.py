"""Times of converted programs: PyTorch, ONNX Runtime and TVM, dense and sparse, side by side in one process."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeify.api import work
from moeify.api.batches import batch
from moeify.api.dense_twin import dense_twin
from moeify.api.load import read_graph
from moeify.api.progress import Progress, Silent
from moeify.api.work import Peaks, Rest
from moeify.errors import BadOption, NotExportable, Refused, RuntimeUnavailable
from moeify.ir.modes import set_training
from moeify.ir.program import Program
from moeify.ir.report import BlockReport, Report

TOKENS = (1, 16, 128, 512)
DENSE, TORCH, ORT, TVM = "dense", "torch", "onnxruntime", "tvm"
FUSED = "dispatch_ffn"  # what the MoE is in PyTorch
PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Row:
    """One model on one runtime at one number of tokens.

    ``tokens`` are rows of the first block, ``lowering`` is "dense" for the dense twin. ``ratio_to_dense`` is over the
    dense twin on the same runtime, the median over rounds of the ratio within a round, and None where there is no
    twin. ``ratio_to_floor`` is ``median_ms`` over the floor of the model that was run, sparse or dense: a roofline
    (FLOPs over the machine's peak, or bytes of the weights over its bandwidth, whichever is longer) of every call of
    a block with its experts chosen evenly, plus one of everything else in the model.
    """

    model: str
    runtime: str
    lowering: str
    tokens: int
    threads: int
    median_ms: float
    ratio_to_dense: float | None
    ratio_to_floor: float


@dataclass
class Bench:
    """The rows, and the machine's peaks on ``threads`` threads: FLOP/s and bytes/s."""

    rows: list[Row] = field(default_factory=list)
    threads: int = 0
    peak_flops: float = 0.0
    peak_bandwidth: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_files(
    files: Sequence[str | Path],
    *,
    tokens: Sequence[int] = TOKENS,
    threads: int = 2,
    rounds: int | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time what ``moeify convert`` wrote: its dense twin and itself in PyTorch, in ONNX Runtime by every lowering, and
    compiled by TVM for this machine.

    A number of ``tokens`` becomes a batch of sequences of at most 128; sizes that a model fixes stay. All candidates
    take turns within a round. ``rounds`` None is as many as fit a second or two. Sets torch's number of threads.
    Raises a MoeifyError; RuntimeUnavailable without ONNX Runtime. Without TVM, or where it cannot compile the program,
    its rows are left out and a note says why.
    """
    _check(tokens, threads, rounds)
    from moeify.backends.onnxruntime import measure

    progress = progress or Silent()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        progress.stage("measuring the machine")
        peaks = Peaks(measure.peak_flops(), measure.peak_bandwidth())
        made = Bench([], threads, peaks.flops, peaks.bandwidth)
        for file in files:
            _bench(Path(file), made, peaks, sorted(set(tokens)), rounds, progress)
    finally:
        torch.set_num_threads(before)
    return made


def _check(tokens: Sequence[int], threads: int, rounds: int | None) -> None:
    for what, number in (("tokens", min(tokens, default=0)), ("threads", threads), ("rounds", rounds)):
        if number is not None and number < 1:
            raise BadOption(f"the number of {what} is {number}: it must be positive")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeUnavailable(
            f"moeify bench needs the package {missing[0]}, which is not installed",
            hint="pip install 'moeify[onnxruntime]'",
        )


def _bench(
    file: Path, made: Bench, peaks: Peaks, tokens: Sequence[int], rounds: int | None, progress: Progress
) -> None:
    from moeify.backends.onnxruntime import candidates, measure
    from moeify.backends.tvm.candidates import Libraries

    progress.stage(f"{file}: reading")
    program, facts = read_graph(file)
    set_training(program.graph_module, False)
    blocks = {block.anchor: block for block in Report.from_dict(facts["report"]).blocks}
    twin = _twin(program, blocks, file, made)
    progress.stage(f"{file}: translating to ONNX")
    models, notes = candidates.lowered(program)
    made.notes += [f"{file}: {note}" for note in notes.values()]
    if twin is not None:
        models[DENSE] = candidates.dense(twin)
    first, _ = work.observe(program, program.example)
    example_rows = max(first, default=1)
    with measure.Sessions(made.threads) as sessions, Libraries(made.threads) as libraries:
        runner = candidates.Runner(models, sessions)
        made.notes += [f"{file}: {name} ran as {what}" for name, what in runner.kernels().items()]
        progress.stage(f"{file}: compiling with TVM")
        compiled = _compile(libraries, program, twin, file, made)
        served: list[tuple[str, str, Any]] = [
            (ORT, name, runner) for name in sorted(models, key=lambda name: name != DENSE)
        ]
        served += [(TVM, name, libraries) for name in compiled]
        done: set[int] = set()
        for wanted in tokens:
            one = batch(program, wanted, example_rows)
            rows, rest = work.observe(program, one.inputs)
            if max(rows) in done:  # the model fixes its sizes
                continue
            done.add(max(rows))
            progress.stage(f"{file}: {max(rows)} tokens")
            calls = _calls(program, twin, served, one.inputs)
            taken = measure.interleaved(calls, rounds)
            floors = _floors(program, twin, blocks, rows, rest, one.inputs, peaks)
            made.rows += rows_of(file.name, taken, max(rows), made.threads, floors)
    if done and done != set(tokens):
        sizes = ", ".join(map(str, sorted(done)))
        made.notes.append(f"{file}: its fixed sizes and its batch make {sizes} tokens")


def _twin(program: Program, blocks: Mapping[str, BlockReport], file: Path, made: Bench) -> Program | None:
    try:
        return dense_twin(program, blocks)
    except Refused as refusal:
        made.notes.append(f"{file}: no dense model to compare with: {refusal.what} ({refusal.where})")
        return None


def _compile(libraries: Any, program: Program, twin: Program | None, file: Path, made: Bench) -> list[str]:
    """The names of what TVM compiled: all or, with a note, nothing."""
    from moeify.backends.tvm.candidates import FUSED as COMPILED

    wanted = {COMPILED: program} if twin is None else {DENSE: twin, COMPILED: program}
    for name, one in wanted.items():
        try:
            libraries.add(name, one)
        except (NotExportable, Refused, RuntimeUnavailable) as error:
            made.notes.append(f"{file}: not compiled by TVM: {error.what}")
            return []
    return list(wanted)


def _calls(
    program: Program, twin: Program | None, served: Sequence[tuple[str, str, Any]], inputs: tuple[torch.Tensor, ...]
) -> dict[tuple[str, str], Callable[[], Any]]:
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    if twin is not None:
        calls[TORCH, DENSE] = lambda: twin.run(*inputs)
    calls[TORCH, FUSED] = lambda: program.run(*inputs)
    for runtime, name, runner in served:
        calls[runtime, name] = lambda name=name, runner=runner: runner.call(name, inputs)  # type: ignore[misc]
    return calls


def _floors(
    program: Program,
    twin: Program | None,
    blocks: Mapping[str, BlockReport],
    rows: Sequence[int],
    rest: Rest,
    inputs: tuple[torch.Tensor, ...],
    peaks: Peaks,
) -> tuple[float, float | None]:
    """Seconds: of the sparse model, and of the dense one."""
    sparse = work.sparse_ffns(program)
    floor = work.floor(sparse, rows, rest, peaks)
    if twin is None:
        return floor, None
    dense = work.dense_ffns(sparse, program, {anchor: block.d_ff for anchor, block in blocks.items()})
    return floor, work.floor(dense, rows, work.rest_of_twin(twin, dense, rows, inputs), peaks)


def rows_of(
    model: str,
    taken: Mapping[tuple[str, str], Sequence[float]],
    tokens: int,
    threads: int,
    floors: tuple[float, float | None],
) -> list[Row]:
    """Rows from the seconds of each (runtime, lowering) in each round, and the floors of the sparse and dense model."""
    made = []
    for (runtime, lowering), seconds in taken.items():
        base = taken.get((runtime, DENSE))
        median = statistics.median(seconds)
        floor = floors[1] if lowering == DENSE else floors[0]
        assert floor is not None
        over_dense = None
        if base is not None:
            over_dense = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        made.append(Row(model, runtime, lowering, tokens, threads, 1e3 * median, over_dense, median / floor))
    return made
