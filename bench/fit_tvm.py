"""Fits the constants of ``backends/tvm/cost.py`` to this machine: ``python -m bench.fit_tvm`` prints them.

One block at a time, float32, 2 threads, tokens that choose their experts evenly; the dense FFN in the same process.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads spin after a call, in the way of TVM's

from collections.abc import Callable
from typing import Any

import torch
import tvm
from tvm import relax, tirx

from bench import fitting
from moeify.backends.onnxruntime import measure
from moeify.backends.roofline import Shape, dense_shape
from moeify.backends.tvm import cost, threads
from moeify.backends.tvm.cpu import pipeline
from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.emitter import Emitter
from moeify.backends.tvm.families import Experts
from moeify.backends.tvm.machine import machine
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weights

THREADS, D_FF, ACTIVATION = 2, 3072, "gelu_tanh"
TOKENS = (1, 4, 16, 64, 128, 512)
# More experts and fewer, wider and narrower: what a cost per expert and per weight is told apart by.
SHAPES = [
    Shape(8, 768, 384, 768, 2),
    Shape(8, 768, 3072, 768, 1),
    Shape(64, 768, 48, 768, 16),
    Shape(32, 768, 384, 768, 2),
    Shape(4, 768, 768, 768, 1),
    Shape(8, 384, 1536, 384, 2),
]


def block(shape: Shape) -> Any:
    """``(x [T, D], experts [T, K], weights [T, K]) -> [T, O]`` by the fused kernels: a function of tensors of TVM."""
    E, D, F, O = shape.num_experts, shape.d_model, shape.d_expert, shape.d_out  # noqa: E741
    values = {"up": torch.randn(E, F, D) * 0.02, "down": torch.randn(E, O, F) * 0.02}
    values |= {"up_bias": torch.randn(E, F) * 0.02, "down_bias": torch.randn(E, O) * 0.02}
    spec = Experts("up", None, "down", "up_bias", None, "down_bias", ACTIVATION, E, D, F, O)

    def body(emitter: Emitter, x: Any, experts: Any, weights: Any) -> Any:
        return table()("dispatch_ffn", emitter, x, experts, weights, spec)

    sizes = [("float32", D), ("int64", shape.top_k), ("float32", shape.top_k)]
    return _compiled(values, sizes, body)


def dense(d_model: int) -> Any:
    """``x [T, D] -> [T, D]`` by the two linear layers of the dense FFN."""
    values = {"up": torch.randn(D_FF, d_model) * 0.02, "down": torch.randn(d_model, D_FF) * 0.02}

    def body(emitter: Emitter, x: Any) -> Any:
        hidden = table()("linear", emitter, x, "up", None, activation=ACTIVATION)
        return table()("linear", emitter, hidden, "down", None)

    return _compiled(values, [("float32", d_model)], body)


def _compiled(values: dict[str, torch.Tensor], sizes: list[tuple[str, int]], body: Callable[..., Any]) -> Any:
    target, weights, tokens = machine(), Weights(values.__getitem__), tirx.Var("tokens", "int64")
    inputs = [relax.Var(f"i{n}", tensor_type((tokens, width), dtype)) for n, (dtype, width) in enumerate(sizes)]
    builder = relax.BlockBuilder()
    with builder.function("main"):
        with builder.dataflow():
            result = builder.emit_output(body(Emitter(builder, target, weights), *inputs))
        builder.emit_func_output(result, params=[*inputs, *(weight.var for weight in weights)])
    runs = relax.VirtualMachine(pipeline.compile(builder.finalize(), target), tvm.cpu())["main"]
    packed = [tvm.runtime.from_dlpack(weight.value()) for weight in weights]
    return lambda *given: runs(*given, *packed)


def inputs(shape: Shape, tokens: int) -> list[Any]:
    """Random rows, each with ``top_k`` different experts drawn evenly, and weights that sum to 1."""
    chosen = torch.rand(tokens, shape.num_experts).argsort(1)[:, : shape.top_k].contiguous()
    weights = torch.rand(tokens, shape.top_k) + 0.1
    made = [torch.randn(tokens, shape.d_model), chosen, weights / weights.sum(1, keepdim=True)]
    return [tvm.runtime.from_dlpack(tensor) for tensor in made]


def main() -> int:
    torch.set_num_threads(THREADS)
    threads.prepare()
    threads.use(THREADS)
    peaks = measure.peak_flops(), measure.peak_bandwidth()
    points: dict[str, list[fitting.Point]] = {cost.FUSED: [], cost.DENSE: []}
    for shape in SHAPES:
        sparse, full = block(shape), dense(shape.d_model)
        for n in TOKENS:
            given = inputs(shape, n)
            taken = measure.interleaved(
                {
                    cost.FUSED: lambda sparse=sparse, given=given: sparse(*given),
                    cost.DENSE: lambda full=full, given=given: full(given[0]),
                }
            )
            points[cost.FUSED].append((shape, n, min(taken[cost.FUSED])))
            points[cost.DENSE].append((dense_shape(shape, D_FF), n, min(taken[cost.DENSE])))
    print(f"flops_per_thread: float = {peaks[0] / THREADS:.3g}\nbandwidth: float = {peaks[1]:.3g}")
    for name, mine in points.items():
        kernel, error = fitting.fit(cost.MEASURED.kernels[name], mine, peaks, THREADS)
        print(f"{name}: {kernel}  # typical error {error:.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
