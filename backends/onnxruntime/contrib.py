"""The ``contrib`` lowering: one ``com.microsoft.MoE`` node a call, ONNX Runtime's own kernel.

The operator routes by itself: softmax of logits, the k largest, normalised. The choice is made before it here, by any
router with weights of at least zero, and is put into words the operator cannot misread: the logits of a token are the
logarithms of its weights where it chose and -1e4 elsewhere, so that softmax gives back the weights over their sum, and
the result is multiplied by that sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import onnx_ir as ir

from moeify.backends.onnxruntime.emit import CONTRIB, Emitter
from moeify.backends.onnxruntime.mixture import Mixture, sizes

_NOT_CHOSEN = -1e4  # exp of it is 0, and float16 holds it; with -inf a row that chose nothing would be NaN
_NO_WEIGHT = 1e-30  # in the place of a weight of 0, as dropped tokens have; float32 holds it and its logarithm
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# What the operator calls an activation. Its "gelu" is the tanh form.
_PLAIN: Mapping[str, str] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu",
    "silu": "silu",
    "identity": "identity",
}
_GATED: Mapping[str, str] = {"silu": "swiglu"}

_TYPES: Mapping[str, tuple[ir.DataType, ...]] = {
    "cpu": (ir.DataType.FLOAT, ir.DataType.FLOAT16),
    "cuda": (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
}

# The largest |gelu(u) - gelu_tanh(u)| over all u is 4.74e-4; a hidden value is of the order of 1.
_GELU_GAP = 5e-4


def lower(emit: Emitter, mixture: Mixture) -> None:
    """Replace a ``DispatchFFN``. The experts of a token must be different, as those of every router are.

    The operator computes k experts for every token: where a slot has none, one of the others, with the weight 0.
    """
    logits_TE = routing_logits(emit, mixture)
    y_TD = emit.op(
        "MoE",
        mixture.x,
        logits_TE,
        fc1_weight(emit, mixture),
        fc1_bias(emit, mixture),
        mixture.stacked["down"],
        mixture.stacked.get("down_bias"),
        domain=CONTRIB,
        **attributes(mixture),
    )
    commit(emit, mixture, y_TD)


def unfit(mixture: Mixture, provider: str) -> str | None:
    """Why the operator cannot compute this mixture on ``cpu`` or ``cuda``, in one line; None when it can."""
    shape, dtype = mixture.shape, mixture.dtype
    if activation_type(mixture) is None:
        kind = "gated" if mixture.gated else "activation"
        return f"com.microsoft.MoE has no {kind} {mixture.activation}"
    if shape.d_out != shape.d_model:
        return f"com.microsoft.MoE gives as many columns as it reads, not {shape.d_out} for {shape.d_model}"
    if dtype not in _TYPES[provider]:
        return f"com.microsoft.MoE has no {dtype.name.lower()} kernel on {provider}"
    if provider == "cuda":
        step = 128 // dtype.bitwidth  # its loads are of 128 bits
        for name, size in (("width", shape.d_model), ("hidden width", shape.d_expert)):
            if size < 16 or size % step:
                return f"com.microsoft.MoE on cuda needs a {name} of at least 16 that {step} divides, not {size}"
    return None


def approximation(mixture: Mixture) -> float:
    """The error, relative to hidden values of the order of 1, that is the operator's own whatever the precision.

    Its GELU is the tanh form, but for float16 on Hopper, where it is the erf form.
    """
    either = mixture.activation == "gelu_tanh" and mixture.dtype == ir.DataType.FLOAT16
    return _GELU_GAP if mixture.activation == "gelu" or either else 0.0


def activation_type(mixture: Mixture) -> str | None:
    """The operator's name for the activation, None when it has none."""
    return (_GATED if mixture.gated else _PLAIN).get(mixture.activation)


def attributes(mixture: Mixture) -> dict[str, Any]:
    """Those of MoE and QMoE alike.

    ``normalize_routing_weights`` is always 1: at 0 the CPU kernel computes from tokens of zeros, silently, wherever it
    is the last reader of a node's output and may write over it. SwiGLU is always interleaved (1): the CPU refuses the
    other layouts.
    """
    activation = activation_type(mixture)
    assert activation is not None
    made: dict[str, Any] = {
        "k": mixture.top_k,
        "activation_type": activation,
        "normalize_routing_weights": 1,
    }
    if activation == "swiglu":
        made["swiglu_fusion"] = 1
    return made


def routing_logits(emit: Emitter, mixture: Mixture) -> ir.Value:
    """[T, E] of the mixture's type, of which softmax over the k largest gives each weight over their sum."""
    dtype, top_k = mixture.dtype, mixture.top_k
    weights_TK = mixture.weights
    if top_k == 1:
        # One logit above -1e4: softmax over it alone is 1 whatever it is.
        return _scatter(emit, mixture, weights_TK, dtype)
    single = ir.DataType.FLOAT
    if dtype in _HALVES:
        weights_TK = emit.op("Cast", weights_TK, name="weights", to=single)
    floored_TK = emit.op("Max", weights_TK, emit.constant(_NO_WEIGHT, single), name="floored")
    logs_TK = emit.op("Log", floored_TK, name="logs")
    if dtype not in _HALVES:
        return _scatter(emit, mixture, logs_TK, single)
    # Softmax does not see a shift, and rounding to half precision is finest near 0.
    largest_T1 = emit.op("ReduceMax", logs_TK, emit.constant([1]), name="largest", keepdims=1)
    centred_TK = emit.op("Sub", logs_TK, largest_T1, name="centred")
    return _scatter(emit, mixture, emit.op("Cast", centred_TK, name="rounded", to=dtype), dtype)


def _scatter(emit: Emitter, mixture: Mixture, chosen_TK: ir.Value, dtype: ir.DataType) -> ir.Value:
    tokens = emit.op("Shape", mixture.experts, name="tokens", start=0, end=1)
    # Slots without an expert write to a column of their own, which is cut off.
    columns = mixture.shape.num_experts + mixture.call.lacking
    shape = emit.op("Concat", tokens, emit.constant([columns]), name="shape", axis=0)
    far = ir.Tensor(numpy.array([_NOT_CHOSEN], dtype=dtype.numpy()), dtype=dtype)
    rows_TE = emit.op("ConstantOfShape", shape, name="not-chosen", value=far)
    logits = emit.op("ScatterElements", rows_TE, mixture.experts, chosen_TK, name="logits", axis=1)
    if not mixture.call.lacking:
        return logits
    end = emit.constant([mixture.shape.num_experts])
    return emit.op("Slice", logits, emit.constant([0]), end, emit.constant([1]), name="of-experts")


def commit(emit: Emitter, mixture: Mixture, y_TD: ir.Value) -> None:
    """Multiply the operator's result by each token's weight sum and put it in the place of the neutral node."""
    old = mixture.node.outputs[0]
    y_TD.type, y_TD.shape = ir.TensorType(mixture.dtype), old.shape  # onnx does not know the operator
    total_T1 = mixture.weights
    if mixture.top_k > 1:
        total_T1 = emit.op("ReduceSum", total_T1, emit.constant([1]), name="weight-sum", keepdims=1)
    emit.commit(emit.op("Mul", y_TD, total_T1, name="weighted"))


def fc1_weight(emit: Emitter, mixture: Mixture) -> ir.Value:
    """[E, I, D]: ``up``, or for SwiGLU the rows of gate and up in turn, which are made when the file is written."""
    if not mixture.gated:
        return mixture.stacked["up"]
    up = mixture.stacked["up"]
    num_experts, d_expert, d_model = sizes(up)
    return _interleaved(emit, mixture, "up", "gate", (num_experts, 2 * d_expert, d_model))


def fc1_bias(emit: Emitter, mixture: Mixture) -> ir.Value | None:
    """[E, I] or, for SwiGLU, interleaved as the weights are; one that is absent beside another is zero."""
    roles = [role for role in ("up_bias", "gate_bias") if role in mixture.stacked]
    if not mixture.gated or not roles:
        return mixture.stacked.get("up_bias")
    num_experts, d_expert = sizes(mixture.stacked[roles[0]])
    return _interleaved(emit, mixture, "up_bias", "gate_bias", (num_experts, 2 * d_expert))


def fc1_of_expert(mixture: Mixture, expert: int, up: str = "up", gate: str = "gate") -> numpy.ndarray:
    """The rows of one expert, [I, D] or [I]; for SwiGLU a new array of gate0, up0, gate1, up1, ..."""
    if not mixture.gated:
        return mixture.array(up)[expert]
    present = next(role for role in (up, gate) if role in mixture.stacked)
    size, *rest = mixture.array(present)[expert].shape
    rows = numpy.zeros((2 * size, *rest), dtype=mixture.dtype.numpy())
    for offset, role in enumerate((gate, up)):
        if role in mixture.stacked:
            rows[offset::2] = mixture.array(role)[expert]
    return rows


def _interleaved(emit: Emitter, mixture: Mixture, up: str, gate: str, shape: tuple[int, ...]) -> ir.Value:
    first = mixture.stacked.get(up) or mixture.stacked[gate]
    name = f"{first.name}.swiglu"

    def make() -> ir.Tensor:
        made = numpy.empty(shape, dtype=mixture.dtype.numpy())
        for expert in range(shape[0]):
            made[expert] = fc1_of_expert(mixture, expert, up, gate)
        return ir.Tensor(made, dtype=mixture.dtype, name=name)

    return emit.initializer(name, ir.LazyTensor(make, dtype=mixture.dtype, shape=ir.Shape(shape), name=name))
