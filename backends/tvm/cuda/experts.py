"""The experts of a block on CUDA: dispatch, and the two grouped products."""

from __future__ import annotations

from typing import Any

from moeify.backends.tvm.cuda.building import DTYPES
from moeify.backends.tvm.cuda.dispatch import dispatch, tiles_of_counts
from moeify.backends.tvm.cuda.grouped import Grouped, make_grouped
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.families import Experts
from moeify.backends.tvm.types import dtype_name, tensor_type


def dispatch_ffn(emitter: Emitter, x: Any, experts: Any, weights: Any, spec: Experts) -> Any:
    """See ``families``. None for a type other than float32 and float16, or weights of another type than ``x``."""
    dtype, (tokens, _), k = dtype_of(x), shape_of(x), shape_of(experts)[1]
    if not _fits(emitter, dtype, spec.up) or dtype_of(weights) != dtype:
        return None
    up = _up(spec, dtype, gather=k)
    order, tiles, _ = dispatch(emitter, experts, spec.num_experts, up.tile.rows)
    hidden = _call(emitter, "moe_up", up, [x, order, tiles], _up_names(spec), tokens * k)
    down = _down(spec, dtype, scatter=k)
    return _call(emitter, "moe_down", down, [hidden, order, tiles, weights], _down_names(spec), tokens)


def experts(emitter: Emitter, rows: Any, counts: Any, spec: Experts) -> Any:
    """See ``families``."""
    dtype, (total, _) = dtype_of(rows), shape_of(rows)
    if not _fits(emitter, dtype, spec.up):
        return None
    up, down = _up(spec, dtype), _down(spec, dtype)
    tiles = tiles_of_counts(emitter, counts, total, spec.num_experts, up.tile.rows)
    hidden = _call(emitter, "moe_rows", up, [rows, tiles], _up_names(spec), total)
    return _call(emitter, "moe_rows", down, [hidden, tiles], _down_names(spec), total)


def grouped_linear(emitter: Emitter, rows: Any, counts: Any, weight: str, bias: str | None) -> Any:
    """See ``families``."""
    dtype, (total, _) = dtype_of(rows), shape_of(rows)
    if not _fits(emitter, dtype, weight):
        return None
    E, outer, inner = emitter.weights.source(weight).shape
    grouped = Grouped(E, inner, outer, dtype, bias=bias is not None)
    tiles = tiles_of_counts(emitter, counts, total, E, grouped.tile.rows)
    return _call(emitter, "moe_rows", grouped, [rows, tiles], (weight, bias), total)


def _fits(emitter: Emitter, dtype: str, weight: str) -> bool:
    return dtype in DTYPES and dtype_name(emitter.weights.source(weight).dtype) == dtype


def _up(spec: Experts, dtype: str, gather: int = 0) -> Grouped:
    return Grouped(
        spec.num_experts,
        spec.d_model,
        spec.d_expert,
        dtype,
        gather=gather,
        gated=spec.gate is not None,
        bias=spec.up_bias is not None,
        gate_bias=spec.gate_bias is not None,
        activation=spec.activation,
    )


def _down(spec: Experts, dtype: str, scatter: int = 0) -> Grouped:
    bias = spec.down_bias is not None
    return Grouped(spec.num_experts, spec.d_expert, spec.d_out, dtype, scatter=scatter, bias=bias)


def _up_names(spec: Experts) -> tuple[str | None, ...]:
    return spec.gate, spec.up, spec.gate_bias, spec.up_bias


def _down_names(spec: Experts) -> tuple[str | None, ...]:
    return spec.down, spec.down_bias


def _call(
    emitter: Emitter, kind: str, grouped: Grouped, inputs: list[Any], names: tuple[str | None, ...], rows: Any
) -> Any:
    arrays = [emitter.weights.plain(name) for name in names if name is not None]
    kernel = emitter.kernel(f"{kind}_{grouped.name}", lambda: make_grouped(grouped))
    result = tensor_type((rows, grouped.outer), grouped.dtype)
    if grouped.scatter <= 1:
        return emitter.call(kernel, [*inputs, *arrays], result)
    partial = tensor_type((shape_of(inputs[0])[0], grouped.outer), "float32")
    both = emitter.call(kernel, [*inputs, *arrays], [partial, result])
    return emitter.emit(both[1])
