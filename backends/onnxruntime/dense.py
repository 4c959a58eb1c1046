"""The dense FFN that a mixture took the place of, with random weights: the baseline of benchmarks."""

from __future__ import annotations

import zlib

import numpy
import onnx_ir as ir

from moeify.backends.onnxruntime.activations import activate
from moeify.backends.onnxruntime.emit import Emitter
from moeify.backends.onnxruntime.mixture import Mixture

_SCALE = 0.02  # of a usual initialisation: values stay in the normal range of floats through many layers


def lower(emit: Emitter, mixture: Mixture, *, d_ff: int) -> None:
    """Replace a ``DispatchFFN`` by ``down(act(up(x)))`` of hidden width ``d_ff``, gated and biased as the experts are.

    Not the function of the mixture: only its cost says anything. The router is left without readers.
    """
    shape = mixture.shape
    hidden = _linear(emit, mixture, "up", mixture.x, d_ff, shape.d_model)
    if mixture.gated:
        gate = _linear(emit, mixture, "gate", mixture.x, d_ff, shape.d_model)
        hidden = emit.op("Mul", activate(emit, mixture.activation, gate, mixture.dtype), hidden, name="dense.gated")
    else:
        hidden = activate(emit, mixture.activation, hidden, mixture.dtype)
    emit.commit(_linear(emit, mixture, "down", hidden, shape.d_out, d_ff))


def _linear(emit: Emitter, mixture: Mixture, role: str, x: ir.Value, rows: int, columns: int) -> ir.Value:
    inputs = [x, _random(emit, mixture, role, (rows, columns))]
    if f"{role}_bias" in mixture.stacked:
        inputs.append(_random(emit, mixture, f"{role}_bias", (rows,)))
    return emit.op("Gemm", *inputs, name=f"dense.{role}", transB=1)


def _random(emit: Emitter, mixture: Mixture, role: str, shape: tuple[int, ...]) -> ir.Value:
    """Made when it is read: a weight of this size need not exist twice."""
    name, dtype = f"{mixture.call.block}.dense.{role}", mixture.dtype

    def draw() -> ir.Tensor:
        values = numpy.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=numpy.float32)
        return ir.Tensor((values * numpy.float32(_SCALE)).astype(dtype.numpy()), dtype=dtype, name=name)

    return emit.initializer(name, ir.LazyTensor(draw, dtype=dtype, shape=ir.Shape(shape), name=name))
