"""The experts of a block on the CPU: its weights packed, and the calls of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tvm import relax

from moeify.backends.tvm.cpu import packing
from moeify.backends.tvm.cpu.dispatch import dispatch, plan_of_counts
from moeify.backends.tvm.cpu.grouped import make_rows, make_scatter
from moeify.backends.tvm.cpu.permute import permute, unpermute
from moeify.backends.tvm.cpu.product import Grouped
from moeify.backends.tvm.cpu.route import route, topk
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.families import Experts, Lower
from moeify.backends.tvm.types import tensor_type
from moeify.errors import BadOption

_FLOATS = ("float32", "float16", "bfloat16")


def table(dtype: torch.dtype = torch.float32) -> Mapping[str, Lower]:
    """The entries of the table of families; matrices of experts are stored as ``dtype``. Raises BadOption."""
    if dtype not in packing.STORED:
        names = ", ".join(str(known) for known in packing.STORED)
        raise BadOption(f"experts cannot be stored as {dtype}", hint=f"choose one of {names}")
    return {
        "dispatch_ffn": partial(_dispatch_ffn, dtype),
        "permute": permute,
        "experts": partial(_experts, dtype),
        "grouped_linear": partial(_grouped_linear, dtype),
        "unpermute": unpermute,
        "topk": topk,
        "route": route,
    }


def _dispatch_ffn(dtype: torch.dtype, emitter: Emitter, x: Any, experts: Any, weights: Any, spec: Experts) -> Any:
    given = dtype_of(x)
    if given not in _FLOATS:
        return None
    K = shape_of(experts)[1]
    x, weights = _float32(emitter, x), _float32(emitter, weights)
    plan, slots = dispatch(emitter, experts, spec.num_experts)
    hidden = _up(dtype, emitter, "moe_up", [x, plan, slots], shape_of(slots)[0], spec, K)
    down, arrays = _down(dtype, emitter, spec, hidden, K)
    kernel = emitter.kernel(f"moe_down_{down.name}", lambda: make_scatter(down))
    out = tensor_type((shape_of(x)[0], spec.d_out), "float32")
    return _back(emitter, emitter.call(kernel, [hidden, plan, slots, weights, *arrays], out), given)


def _experts(dtype: torch.dtype, emitter: Emitter, rows: Any, counts: Any, spec: Experts) -> Any:
    given = dtype_of(rows)
    if given not in _FLOATS:
        return None
    rows = _float32(emitter, rows)
    plan = plan_of_counts(emitter, counts, spec.num_experts)
    hidden = _up(dtype, emitter, "moe_rows", [rows, plan], shape_of(rows)[0], spec, 0)
    down, arrays = _down(dtype, emitter, spec, hidden, 0)
    return _back(emitter, _rows(emitter, "moe_rows", down, [hidden, plan], arrays, shape_of(rows)[0]), given)


def _grouped_linear(dtype: torch.dtype, emitter: Emitter, rows: Any, counts: Any, weight: str, bias: str | None) -> Any:
    given = dtype_of(rows)
    if given not in _FLOATS:
        return None
    E, O, I = emitter.weights.source(weight).shape  # noqa: E741
    spec = Grouped(E, I, O, emitter.machine.tile, dtype=dtype, bias=bias is not None)
    arrays = _arrays(emitter, spec, (weight,), (bias,))
    plan = plan_of_counts(emitter, counts, E)
    rows = _float32(emitter, rows)
    return _back(emitter, _rows(emitter, "moe_rows", spec, [rows, plan], arrays, shape_of(rows)[0]), given)


def _up(dtype: torch.dtype, emitter: Emitter, kind: str, inputs: list[Any], rows: Any, spec: Experts, k: int) -> Any:
    """The hidden rows, of whole panels: what is beyond the last unit meets no weight."""
    names = (spec.up,) if spec.gate is None else (spec.gate, spec.up)
    biases = (spec.up_bias,) if spec.gate is None else (spec.gate_bias, spec.up_bias)
    grouped = Grouped(
        spec.num_experts,
        spec.d_model,
        spec.d_expert,
        emitter.machine.tile,
        k=k,
        dtype=dtype,
        bias=any(bias is not None for bias in biases),
        gated=spec.gate is not None,
        activation=spec.activation,
        padded=True,
    )
    return _rows(emitter, kind, grouped, inputs, _arrays(emitter, grouped, names, biases), rows)


def _down(dtype: torch.dtype, emitter: Emitter, spec: Experts, hidden: Any, k: int) -> tuple[Grouped, list[Any]]:
    grouped = Grouped(
        spec.num_experts,
        spec.d_expert,
        spec.d_out,
        emitter.machine.tile,
        k=k,
        stride=shape_of(hidden)[1],
        dtype=dtype,
        bias=spec.down_bias is not None,
    )
    return grouped, _arrays(emitter, grouped, (spec.down,), (spec.down_bias,))


def _rows(emitter: Emitter, kind: str, spec: Grouped, inputs: list[Any], arrays: list[Any], rows: Any) -> Any:
    kernel = emitter.kernel(f"{kind}_{spec.name}", lambda: make_rows(spec))
    return emitter.call(kernel, [*inputs, *arrays], tensor_type((rows, spec.out_width), "float32"))


def _arrays(emitter: Emitter, spec: Grouped, names: tuple[str, ...], biases: tuple[str | None, ...]) -> list[Any]:
    """The packed matrix, or a gate and its matrix in one, and the bias where there is one."""
    source, columns = emitter.weights.source, spec.tile.columns
    known = source(names[0])

    def matrix() -> Tensor:
        values = [packing.stored(source(name), spec.dtype, name) for name in names]
        if not spec.gated:
            return packing.panels(values[0], columns)
        gate, up = values
        return packing.gated_panels(gate, up, columns)

    def bias() -> Tensor:
        absent = torch.zeros(spec.experts, spec.width, device=known.device)
        values = [absent if name is None else source(name).float() for name in biases]
        if not spec.gated:
            return packing.padded(values[0], columns)
        gate, up = values
        return packing.gated_biases(gate, up, columns)

    with_gate = "_with_gate" if spec.gated else ""
    layout = f"panels{columns}{with_gate}_{str(spec.dtype).removeprefix('torch.')}"
    dtype = packing.stored_dtype(spec.dtype)
    arrays = [emitter.weights.packed(names[-1], layout, spec.packed_shape, dtype, matrix)]
    if spec.bias:
        name = next(name for name in reversed(biases) if name is not None)
        layout = f"padded{columns}{with_gate}"
        arrays.append(emitter.weights.packed(name, layout, spec.bias_shape, torch.float32, bias))
    return arrays


def _float32(emitter: Emitter, x: Any) -> Any:
    return x if dtype_of(x) == "float32" else emitter.emit(relax.op.astype(x, "float32"))


def _back(emitter: Emitter, y: Any, dtype: str) -> Any:
    return y if dtype == "float32" else emitter.emit(relax.op.astype(y, dtype))
