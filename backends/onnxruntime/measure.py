"""Timing lowerings on this machine: one block as a model of its own, and the rates that the floor is made of."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch

from moeify.backends.calls import Call
from moeify.backends.onnxruntime.emit import Emitter
from moeify.backends.onnxruntime.lowering import Lowering
from moeify.backends.onnxruntime.mixture import ROLES, Mixture, Shape, read
from moeify.backends.onnxruntime.neutral import DOMAIN, OPSET
from moeify.backends.onnxruntime.session import Session

IR_VERSION = 10  # ONNX Runtime 1.31 reads up to 13
_FEWEST, _ROUNDS = 5, 15
_LONGEST = 1.5  # seconds that all rounds of the slowest call may take; there are fewer then
_SETTLE = 5e-3
_ALONE = {"session.force_spinning_stop": "1"}  # else a session's idle threads take time from the one that runs
_GEMM, _STREAM_BYTES = 1536, 256 << 20  # a product that is all arithmetic; an array that no cache holds

Key = TypeVar("Key", bound=Hashable)


def interleaved(calls: Mapping[Key, Callable[[], Any]], rounds: int | None = None) -> dict[Key, list[float]]:
    """Seconds of each call in each round. The calls take turns, so that a busy neighbour weighs on all of them.

    Before it is timed, a call is repeated untimed for a few milliseconds: the threads of the one before it go on
    spinning for as long. ``rounds`` None is 15, or fewer, at least 5, where a call takes more than a tenth of a second.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        if rounds is None:
            slowest = max(_once(call, settle=0.0) for call in calls.values())
            rounds = max(_FEWEST, min(_ROUNDS, int(_LONGEST / slowest)))
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(_once(call, _SETTLE))
    finally:
        if collecting:
            gc.enable()
    return seconds


def _once(call: Callable[[], Any], settle: float) -> float:
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < settle:
        call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(seconds: Mapping[Key, Sequence[float]], name: Key, base: Key) -> float:
    """The median over the rounds of one call's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def peak_flops(rounds: int = 5) -> float:
    """FLOP/s of a large float32 matrix product on torch's current number of threads: the best of the rounds."""
    a, b = torch.rand(_GEMM, _GEMM), torch.rand(_GEMM, _GEMM)
    out = torch.empty(_GEMM, _GEMM)
    best = min(interleaved({"gemm": lambda: torch.mm(a, b, out=out)}, rounds)["gemm"])
    return 2.0 * _GEMM**3 / best


def peak_bandwidth(rounds: int = 5) -> float:
    """Bytes/s read from memory on torch's current number of threads: the best of the rounds."""
    data = torch.ones(_STREAM_BYTES // 4)
    return _STREAM_BYTES / min(interleaved({"sum": data.sum}, rounds)["sum"])


def synthetic(
    shape: Shape, *, gated: bool = False, bias: bool = True, activation: str = "gelu", seed: int = 0
) -> Mixture:
    """A float32 mixture with random weights, in a model of its own: inputs x [T, D], experts and weights [T, K]."""
    draw = numpy.random.default_rng(seed)
    E, D, F, out = shape.num_experts, shape.d_model, shape.d_expert, shape.d_out
    sizes: dict[str, tuple[int, ...]] = {"up": (E, F, D), "gate": (E, F, D), "down": (E, out, F)}
    sizes |= {"up_bias": (E, F), "gate_bias": (E, F), "down_bias": (E, out)}
    absent = {role for role in sizes if (role.startswith("gate") and not gated) or (role.endswith("bias") and not bias)}
    stacked = {
        role: ir.Tensor(draw.standard_normal(size, dtype=numpy.float32) * numpy.float32(0.02), name=role)
        for role, size in sizes.items()
        if role not in absent
    }
    return _alone(stacked, shape, activation, ir.DataType.FLOAT, "block")[1]


def block_model(mixture: Mixture, lower: Lowering) -> ir.Model:
    """One call as a model of its own, lowered: inputs ``x`` [T, D], ``experts`` and ``weights`` [T, K], output ``y``.

    The weights are shared with the mixture's model.
    """
    tensors = {role: value.const_value for role, value in mixture.stacked.items()}
    model, alone = _alone(tensors, mixture.shape, mixture.activation, mixture.dtype, mixture.call.block)
    lower(Emitter(model, alone.node, alone.call.name), alone)
    model.opset_imports.pop(DOMAIN, None)
    common.RemoveUnusedNodesPass()(model)
    return model


def block_inputs(shape: Shape, tokens: int, dtype: ir.DataType, seed: int = 0) -> dict[str, numpy.ndarray]:
    """Random rows, each with ``top_k`` different experts drawn evenly, and weights that sum to 1."""
    draw = numpy.random.default_rng(seed)
    chosen = draw.random((tokens, shape.num_experts)).argsort(axis=1)[:, : shape.top_k]
    weights = draw.random((tokens, shape.top_k)) + 0.1
    return {
        "x": draw.standard_normal((tokens, shape.d_model)).astype(dtype.numpy()),
        "experts": chosen.astype(numpy.int64),
        "weights": (weights / weights.sum(1, keepdims=True)).astype(dtype.numpy()),
    }


class Sessions:
    """Runtime sessions over models that are written to a temporary folder, which goes with this."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="moeify-")
        self._count = 0

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def open(self, model: ir.Model) -> Session:
        """A Session on the CPU. Weights go to a file of their own: protobuf takes 2 GiB at most."""
        self._count += 1
        path = Path(self._folder.name, f"{self._count}.onnx")
        ir.save(model, path, external_data=f"{path.name}.data")
        return Session(path, threads=self.threads, options=_ALONE)


def seconds(
    mixture: Mixture,
    lowerings: Mapping[str, Lowering],
    *,
    tokens: int,
    threads: int | None = None,
    rounds: int | None = None,
) -> dict[str, float]:
    """Median seconds of one call of the block on the CPU by each of ``lowerings``, in turn, all in this process."""
    with Sessions(threads) as sessions:
        calls = block_calls(sessions, mixture, lowerings, tokens)
        taken = interleaved(calls, rounds)
    return {name: statistics.median(times) for name, times in taken.items()}


def block_calls(
    sessions: Sessions, mixture: Mixture, lowerings: Mapping[str, Lowering], tokens: int
) -> dict[str, Callable[[], Any]]:
    """A call of no arguments for each lowering."""
    made = {name: sessions.open(block_model(mixture, lower)) for name, lower in lowerings.items()}
    return {name: runner(session, mixture, tokens) for name, session in made.items()}


def runner(session: Session, mixture: Mixture, tokens: int) -> Callable[[], Any]:
    """Runs a session of a ``block_model`` on random rows; inputs that its lowering does not read are left out."""
    data = block_inputs(mixture.shape, tokens, mixture.dtype)
    inputs = {name: data[name] for name in session.input_names}
    return lambda: session.run(inputs)


def measure(
    table: Mapping[str, Lowering], *, tokens: int, threads: int | None
) -> Callable[[Mixture, Sequence[str]], Mapping[str, float]]:
    """What ``choose.chooser`` takes as ``measured``. Blocks of one shape and activation are timed once."""
    known: dict[tuple, Mapping[str, float]] = {}

    def times(mixture: Mixture, names: Sequence[str]) -> Mapping[str, float]:
        key = (mixture.shape, mixture.gated, mixture.activation, mixture.dtype, tuple(names))
        if key not in known:
            known[key] = seconds(mixture, {name: table[name] for name in names}, tokens=tokens, threads=threads)
        return known[key]

    return times


def _alone(
    tensors: Mapping[str, Any], shape: Shape, activation: str, dtype: ir.DataType, block: str
) -> tuple[ir.Model, Mixture]:
    """A model of one neutral node, and what the node says."""
    x = _value("x", dtype, ["tokens", shape.d_model])
    experts = _value("experts", ir.DataType.INT64, ["tokens", shape.top_k])
    weights = _value("weights", dtype, ["tokens", shape.top_k])
    stacked = {
        role: ir.Value(
            name=f"{block}.experts.{role}",
            const_value=tensor,
            type=ir.TensorType(dtype),
            shape=ir.Shape(tensor.shape),
        )
        for role, tensor in tensors.items()
    }
    node = ir.node(
        "DispatchFFN",
        [x, experts, weights, *(stacked.get(role) for role in ROLES)],
        {"activation": activation},
        domain=DOMAIN,
        name="moe",
    )
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(dtype), ir.Shape(["tokens", shape.d_out])
    graph = ir.Graph(
        [x, experts, weights],
        [y],
        nodes=[node],
        initializers=list(stacked.values()),
        opset_imports={"": OPSET, DOMAIN: 1},
        name="block",
    )
    model = ir.Model(graph, ir_version=IR_VERSION)
    return model, read(node, Call(block, 0, "x", "experts", "weights", "y", ("moe",)))


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
