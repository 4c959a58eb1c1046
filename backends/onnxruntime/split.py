"""The ``split`` lowering: standard ONNX, one pair of Gemm nodes an expert, each over that expert's rows alone.

Exact for every router and every activation, experts without rows included, on every runtime. On the CPU it is also the
fastest of the lowerings from a few rows on: the runtime repacks constant matrices once, at loading, and its Gemm uses
all threads.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import onnx_ir as ir

from moeify.backends.onnxruntime import dispatch
from moeify.backends.onnxruntime.activations import activate
from moeify.backends.onnxruntime.emit import Emitter
from moeify.backends.onnxruntime.mixture import ROLES, Mixture, array, expert_weight, sizes, static_size

_WORTH_CUTTING = 16  # hidden units: the columns of one tile of the runtime's float32 Gemm kernel


def lower(emit: Emitter, mixture: Mixture) -> None:
    """Replace a ``DispatchFFN``."""
    counts_E, order_R = dispatch.sort(emit, mixture.experts, mixture.shape.num_experts)
    lacking = mixture.call.lacking
    # The tokens are split, eight bytes a row, and each expert gathers its own rows: no copy of all rows in between.
    token_R = dispatch.tokens(emit, order_R, mixture.top_k)
    parts, _ = dispatch.split(emit, token_R, counts_E, mixture.shape.num_experts, lacking)
    results = []
    for e, part in enumerate(parts):
        rows = emit.op("Gather", mixture.x, part, name=f"expert-{e}.rows")
        results.append(_expert(emit, mixture.stacked, mixture.activation, e, rows))
    if lacking:
        zero = numpy.zeros((1, mixture.shape.d_out), dtype=mixture.dtype.numpy())
        results.append(emit.constant(zero, mixture.dtype))
    rows_RO = dispatch.join(emit, results)
    emit.commit(dispatch.combine(emit, rows_RO, order_R, mixture.weights, mixture.top_k, lacking))


def lower_permute(emit: Emitter, node: ir.Node, lacking: bool) -> None:
    """Replace a ``Permute``."""
    x, experts = node.inputs
    assert x is not None
    assert experts is not None
    counts_E, order_R = dispatch.sort(emit, experts, node.attributes["num_experts"].as_int())
    rows_RD = emit.op("Gather", x, dispatch.tokens(emit, order_R, static_size(experts, 1)), name="rows")
    emit.commit(rows_RD, counts_E, order_R)


def lower_unpermute(emit: Emitter, node: ir.Node, lacking: bool) -> None:
    """Replace an ``Unpermute``."""
    rows, order, weights = node.inputs
    assert rows is not None
    assert order is not None
    assert weights is not None
    emit.commit(dispatch.combine(emit, rows, order, weights, static_size(weights, 1)))


def lower_grouped_linear(emit: Emitter, node: ir.Node, lacking: bool) -> None:
    """Replace a ``GroupedLinear``: ``rows[r] @ weight[e].T + bias[e]`` for the expert e of row r."""
    rows, counts, weight, *rest = node.inputs
    assert rows is not None
    assert counts is not None
    assert weight is not None
    bias = rest[0] if rest else None
    num_experts, out, _ = sizes(weight)
    parts, beyond = dispatch.split(emit, rows, counts, num_experts, lacking)
    results = [_linear(emit, part, weight, bias, e, f"expert-{e}") for e, part in enumerate(parts)]
    emit.commit(dispatch.join(emit, [*results, *_nothing(emit, beyond, out, weight)]))


def lower_experts(emit: Emitter, node: ir.Node, lacking: bool) -> None:
    """Replace an ``Experts``: rows come sorted, and go so."""
    rows, counts, *weights = node.inputs
    assert rows is not None
    assert counts is not None
    stacked = {role: value for role, value in zip(ROLES, weights) if value is not None}
    activation = node.attributes["activation"].as_string()
    num_experts, out, _ = sizes(stacked["down"])
    parts, rest = dispatch.split(emit, rows, counts, num_experts, lacking)
    results = [_expert(emit, stacked, activation, e, part) for e, part in enumerate(parts)]
    emit.commit(dispatch.join(emit, [*results, *_nothing(emit, rest, out, stacked["down"])]))


def _nothing(emit: Emitter, rest: ir.Value | None, width: int, weight: ir.Value) -> list[ir.Value]:
    assert weight.dtype is not None
    return [] if rest is None else [dispatch.zeros(emit, rest, width, weight.dtype)]


def _expert(emit: Emitter, stacked: Mapping[str, ir.Value], activation: str, e: int, rows: ir.Value) -> ir.Value:
    dtype = stacked["up"].dtype
    assert dtype is not None
    units = used_units(stacked["down"], e)
    hidden = _linear(emit, rows, stacked["up"], stacked.get("up_bias"), e, f"expert-{e}.up", units)
    if "gate" in stacked:
        gate = _linear(emit, rows, stacked["gate"], stacked.get("gate_bias"), e, f"expert-{e}.gate", units)
        hidden = emit.op("Mul", activate(emit, activation, gate, dtype), hidden, name=f"expert-{e}.gated")
    else:
        hidden = activate(emit, activation, hidden, dtype)
    down, bias = expert_weight(emit, stacked["down"], e, units, axis=1), stacked.get("down_bias")
    inputs = [hidden, down] if bias is None else [hidden, down, expert_weight(emit, bias, e)]
    return emit.op("Gemm", *inputs, name=f"expert-{e}.down", transB=1)


def _linear(
    emit: Emitter,
    rows: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    e: int,
    name: str,
    units: numpy.ndarray | None = None,
) -> ir.Value:
    inputs = [rows, expert_weight(emit, weight, e, units)]
    if bias is not None:
        inputs.append(expert_weight(emit, bias, e, units))
    return emit.op("Gemm", *inputs, name=name, transB=1)


def used_units(down: ir.Value, e: int) -> numpy.ndarray | None:
    """The hidden units of an expert whose column of ``down`` is not all zero; None when too few can be left out.

    Such a unit adds nothing whatever its activation, so that cutting it is exact: experts of different sizes are
    padded to a common width in the stacked weights. A product with an empty inner axis is not for every runtime, so
    one unit always stays.
    """
    column_is_used = (array(down)[e] != 0).any(axis=0)
    units = numpy.flatnonzero(column_is_used)
    if len(units) == 0:
        units = numpy.zeros(1, dtype=numpy.int64)
    return units if len(column_is_used) - len(units) >= _WORTH_CUTTING else None
