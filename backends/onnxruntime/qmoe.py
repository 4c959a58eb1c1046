"""The ``qmoe`` lowering: one ``com.microsoft.QMoE`` node a call, experts as int8 or int4 with scales.

Routing is that of ``contrib``. Weights are quantised when the file is written, one expert at a time, so that neither
this nor the writing holds a second copy of a model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
import onnx_ir as ir

from moeify.backends.onnxruntime import contrib
from moeify.backends.onnxruntime.emit import CONTRIB, Emitter
from moeify.backends.onnxruntime.mixture import Mixture, sizes

BITS = (4, 8)
BLOCKS = (32, 64, 128)
_STEP_CUDA = 64
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def lower(emit: Emitter, mixture: Mixture, *, bits: int, block: int | None) -> None:
    """Replace a ``DispatchFFN``; ``unfit`` must be None.

    ``bits`` is 4 or 8. Every ``block`` consecutive weights of a row have a scale; with None every row has one.
    ``weights_prepacked`` is always 0: its default means weights already in a layout of the CUDA kernels. The operator's
    ``router_weights`` is never used: CUDA ignores it.
    """
    attributes = contrib.attributes(mixture) | {"expert_weight_bits": bits, "quant_type": "int", "weights_prepacked": 0}
    if block is not None:
        attributes["block_size"] = block
    fc1_width = 2 * mixture.shape.d_expert if mixture.gated else mixture.shape.d_expert
    fc1, fc1_scales = _quantised(
        emit,
        f"{mixture.stacked['up'].name}.fc1",
        (mixture.shape.num_experts, fc1_width, mixture.shape.d_model),
        lambda expert: contrib.fc1_of_expert(mixture, expert),
        mixture.dtype,
        bits,
        block,
    )
    down = mixture.stacked["down"]
    fc2, fc2_scales = _quantised(
        emit, str(down.name), sizes(down), lambda expert: mixture.array("down")[expert], mixture.dtype, bits, block
    )
    y_TD = emit.op(
        "QMoE",
        mixture.x,
        contrib.routing_logits(emit, mixture),
        fc1,
        fc1_scales,
        contrib.fc1_bias(emit, mixture),
        fc2,
        fc2_scales,
        mixture.stacked.get("down_bias"),
        domain=CONTRIB,
        **attributes,
    )
    contrib.commit(emit, mixture, y_TD)


def unfit(mixture: Mixture, provider: str, bits: int, block: int | None) -> str | None:
    """Why the operator cannot compute this mixture on ``cpu`` or ``cuda``, in one line; None when it can."""
    shape = mixture.shape
    if bits not in BITS:
        return f"com.microsoft.QMoE takes weights of 4 or 8 bits, not {bits}"
    if block is not None and block not in BLOCKS:
        return f"com.microsoft.QMoE takes blocks of 32, 64 or 128 weights, not {block}"
    reason = contrib.unfit(mixture, provider)
    if reason is not None:
        return reason.replace(".MoE", ".QMoE", 1)
    if provider == "cuda" and mixture.dtype not in _HALVES:
        return "com.microsoft.QMoE on cuda takes float16 or bfloat16 activations, and puts float32 on the cpu unasked"
    if provider == "cpu" and bits == 8 and block is not None:
        return "com.microsoft.QMoE on cpu rounds activations to 8 bits where int8 weights have blocks"
    step = max(block or 1, _STEP_CUDA if provider == "cuda" else 8 // bits)
    for name, size in (("width", shape.d_model), ("hidden width", shape.d_expert)):
        if size % step:
            return f"com.microsoft.QMoE takes a {name} that {step} divides here, not {size}"
    return None


def quantise(
    rows: numpy.ndarray, bits: int, block: int | None, dtype: ir.DataType
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(packed [N, K * bits / 8] uint8, scales [N, K / block], or [N] without a block) of ``rows`` [N, K].

    Symmetric: a weight is ``(q - 2**(bits - 1)) * scale`` with q of ``bits`` bits, and of two 4-bit q in a byte the
    lower half is the first. The weight of the largest magnitude is the lowest q, which is the extra one of two's
    complement (the convention of ONNX Runtime's MatMulNBits). Scales are rounded to ``dtype`` first, so that q is the
    nearest to what the runtime will read.
    """
    half = 2 ** (bits - 1)
    groups = rows.astype(numpy.float32).reshape(len(rows), -1, block or rows.shape[1])
    largest = numpy.take_along_axis(groups, numpy.abs(groups).argmax(axis=2)[..., None], axis=2)
    scales = (largest / -half).astype(dtype.numpy())
    divisor = numpy.where(scales == 0, 1, scales).astype(numpy.float32)
    q = numpy.clip(numpy.rint(groups / divisor) + half, 0, 2 * half - 1).astype(numpy.uint8).reshape(rows.shape)
    if bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    return q, scales[..., 0] if block is not None else scales[:, 0, 0]


def dequantise(packed: numpy.ndarray, scales: numpy.ndarray, bits: int) -> numpy.ndarray:
    """What the runtime reads: [N, K] float32 of one expert's ``quantise``."""
    q = packed if bits == 8 else numpy.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    groups = (q.astype(numpy.float32) - 2 ** (bits - 1)).reshape(len(q), scales.size // len(q), -1)
    return (groups * scales.astype(numpy.float32).reshape(len(q), -1, 1)).reshape(len(q), -1)


def _quantised(
    emit: Emitter,
    name: str,
    shape: tuple[int, ...],
    of_expert: Callable[[int], numpy.ndarray],
    dtype: ir.DataType,
    bits: int,
    block: int | None,
) -> tuple[ir.Value, ir.Value]:
    """Initializers of the weights [E, N, K * bits / 8] and their scales [E, N, K / block] or [E, N], not yet made."""
    num_experts, rows, columns = shape
    per_row = () if block is None else (columns // block,)
    parts = (
        ("weights", ir.DataType.UINT8, (num_experts, rows, columns * bits // 8)),
        ("scales", dtype, (num_experts, rows, *per_row)),
    )

    def lazy(which: int) -> ir.Value:
        suffix, kind, size = parts[which]
        full = f"{name}.int{bits}.{'rows' if block is None else block}.{suffix}"

        def make() -> ir.Tensor:
            made = numpy.empty(size, dtype=kind.numpy())
            for expert in range(num_experts):
                made[expert] = quantise(of_expert(expert), bits, block, dtype)[which]
            return ir.Tensor(made, dtype=kind, name=full)

        return emit.initializer(full, ir.LazyTensor(make, dtype=kind, shape=ir.Shape(size), name=full))

    return lazy(0), lazy(1)
