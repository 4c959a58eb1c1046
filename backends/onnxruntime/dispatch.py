"""Dispatch in standard ONNX: which copies of which tokens go to which expert, and their weighted sum back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import onnx_ir as ir

from moeify.backends.onnxruntime.emit import Emitter


def sort(emit: Emitter, experts_TK: ir.Value, num_experts: int) -> tuple[ir.Value, ir.Value]:
    """(counts_E, order_R): the stable sort of the flat slots ``t * K + k`` by expert; slots without one come last.

    TopK puts the lower index first among equal values, in the standard and in ONNX Runtime, so it is a stable sort.
    """
    flat_R = emit.op("Reshape", experts_TK, emit.constant([-1]), name="slots")
    _, order_R = emit.many(
        "TopK", flat_R, emit.op("Shape", flat_R, name="rows"), outputs=2, name="order", axis=0, largest=0, sorted=1
    )
    column_R1 = emit.op("Unsqueeze", flat_R, emit.constant([1]), name="column")
    is_expert_RE = emit.op("Equal", column_R1, emit.constant(numpy.arange(num_experts)), name="is-expert")
    ones_RE = emit.op("Cast", is_expert_RE, name="ones", to=ir.DataType.INT64)
    counts_E = emit.op("ReduceSum", ones_RE, emit.constant([0]), name="counts", keepdims=0)
    return counts_E, order_R


def tokens(emit: Emitter, order_R: ir.Value, top_k: int) -> ir.Value:
    """The token of each sorted row."""
    return order_R if top_k == 1 else emit.op("Div", order_R, emit.constant(top_k), name="token")


def split(
    emit: Emitter, rows: ir.Value, counts_E: ir.Value, num_experts: int, lacking: bool
) -> tuple[Sequence[ir.Value], ir.Value | None]:
    """Sorted rows (or their tokens) by expert, some empty; and the rows of no expert, None where there are none."""
    if not lacking:
        if num_experts == 1:
            return [rows], None
        return emit.many("Split", rows, counts_E, outputs=num_experts, name="by-expert", axis=0), None
    total = emit.op("Shape", rows, name="all-rows", start=0, end=1)
    counted = emit.op("ReduceSum", counts_E, emit.constant([0]), name="counted", keepdims=1)
    sizes = emit.op("Concat", counts_E, emit.op("Sub", total, counted, name="rest"), name="sizes", axis=0)
    *parts, rest = emit.many("Split", rows, sizes, outputs=num_experts + 1, name="by-expert", axis=0)
    return parts, rest


def join(emit: Emitter, parts: Sequence[ir.Value]) -> ir.Value:
    return parts[0] if len(parts) == 1 else emit.op("Concat", *parts, name="sorted", axis=0)


def zeros(emit: Emitter, rest: ir.Value, width: int, dtype: ir.DataType) -> ir.Value:
    """The result of rows of no expert."""
    rows = emit.op("Shape", rest, name="rest-rows", start=0, end=1)
    shape = emit.op("Concat", rows, emit.constant([width]), name="rest-shape", axis=0)
    zero = ir.Tensor(numpy.zeros(1, dtype=dtype.numpy()), dtype=dtype)
    return emit.op("ConstantOfShape", shape, name="nothing", value=zero)


def combine(
    emit: Emitter, rows_RD: ir.Value, order_R: ir.Value, weights_TK: ir.Value, top_k: int, lacking: bool = False
) -> ir.Value:
    """``y[t] = sum_k weights[t, k] * rows[row of slot t * K + k]``.

    Where slots are ``lacking``, the last of the rows stands for all those of no expert.
    """
    # A permutation sorted is the identity; where its elements came from is its inverse.
    _, inverse_R = emit.many(
        "TopK", order_R, emit.op("Shape", order_R, name="rows"), outputs=2, name="inverse", axis=0, largest=0, sorted=1
    )
    if lacking:
        count = emit.op("Shape", rows_RD, name="computed", start=0, end=1)
        last = emit.op("Sub", count, emit.constant([1]), name="last")
        inverse_R = emit.op("Min", inverse_R, last, name="there")
    if top_k == 1:
        return emit.op("Mul", emit.op("Gather", rows_RD, inverse_R, name="back"), weights_TK, name="weighted")
    slots_TK = emit.op("Reshape", inverse_R, emit.constant([-1, top_k]), name="slots")
    copies_TKD = emit.op("Gather", rows_RD, slots_TK, name="back")
    column_TK1 = emit.op("Unsqueeze", weights_TK, emit.constant([2]), name="column")
    weighted_TKD = emit.op("Mul", copies_TKD, column_TK1, name="weighted")
    return emit.op("ReduceSum", weighted_TKD, emit.constant([1]), name="sum", keepdims=0)
