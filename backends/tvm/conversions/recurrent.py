"""LSTM: the products with the input are one linear layer of the whole sequence, the steps a kernel of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax, tirx
from tvm.script import tirx as T

from moeify.backends.tvm.conversions.matrices import by_name
from moeify.backends.tvm.conversions.movement import permuted
from moeify.backends.tvm.conversions.slices import joined, sliced
from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.emitter import shape_of
from moeify.backends.tvm.types import tensor_type

_aten = torch.ops.aten


def _lstm(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    params, biased, layers = args["params"], args["has_biases"], args["num_layers"]
    ways = 2 if args["bidirectional"] else 1
    each = 4 if biased else 2
    value = args["input"].meta["val"]
    fits = len(params) == each * layers * ways and value.dim() == 3 and value.dtype == torch.float32
    if args["train"] or not fits or any(t.name(param) is None for param in params):
        return NotImplemented  # a projection of the hidden value, weights that are computed
    x = t.tensor(args["input"])
    x = x if args["batch_first"] else permuted(t, x, [1, 0, 2])
    hidden, cell = (t.tensor(state) for state in args["hx"])
    ends: list[list[Any]] = [[], []]
    for layer in range(layers):
        outs = []
        for way in range(ways):
            place = layer * ways + way
            own = params[place * each : (place + 1) * each]
            begin = [_row(t, state, place) for state in (hidden, cell)]
            out, *end = _layer(t, x, own, begin, backwards=way == 1)
            outs.append(out)
            for gathered, one in zip(ends, end):
                gathered.append(t.reshape(one, [1, *shape_of(one)]))
        width = sum(int(shape_of(out)[2]) for out in outs)
        x = joined(t, outs, 2, width)
    x = x if args["batch_first"] else permuted(t, x, [1, 0, 2])
    return [x, *(joined(t, gathered, 0, layers * ways) for gathered in ends)]


def _row(t: Translation, states: Any, place: int) -> Any:
    return t.reshape(sliced(t, states, 0, place, 1), shape_of(states)[1:])


def _layer(t: Translation, x: Any, params: list[fx.Node], begin: list[Any], backwards: bool) -> list[Any]:
    """One direction of one layer: all hidden values, the last of them, the last cell."""
    inner, outer, *biases = params
    name = t.name(inner)
    assert name is not None
    inputs = by_name(t, None, x, name, biases[0] if biases else None)
    if biases:
        inputs = t.emit(relax.op.add(inputs, t.tensor(biases[1])))
    width = int(outer.meta["val"].shape[1])
    turned = t.emitter.weights.plain(t.constants.derive(outer, "T", lambda w: w.t()))
    batch, length, _ = shape_of(inputs)
    direction = "backwards" if backwards else "forwards"
    kernel = t.emitter.kernel(f"lstm_{direction}_{width}", lambda: _steps(width, backwards))
    types = [tensor_type((batch, length, width), "float32"), *[tensor_type((batch, width), "float32")] * 2]
    result = t.emitter.call(kernel, [inputs, turned, *begin], types)
    return [t.emit(relax.TupleGetItem(result, i)) for i in range(3)]


def _steps(H: int, backwards: bool) -> tirx.PrimFunc:
    """The recurrence, of batch rows in parallel. Gates are in torch's order: input, forget, cell, output."""

    @T.prim_func(s_tir=True)
    def steps(
        inputs: T.handle, outer: T.handle, begin_h: T.handle, begin_c: T.handle,
        out: T.handle, end_h: T.handle, end_c: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(inputs, (B, S, 4 * H), "float32")
        W = T.match_buffer(outer, (H, 4 * H), "float32")
        H0 = T.match_buffer(begin_h, (B, H), "float32")
        C0 = T.match_buffer(begin_c, (B, H), "float32")
        Y = T.match_buffer(out, (B, S, H), "float32")
        H1 = T.match_buffer(end_h, (B, H), "float32")
        C1 = T.match_buffer(end_c, (B, H), "float32")
        for b in T.parallel(B):
            gates = T.alloc_buffer((4 * H,), "float32")
            for j in range(H):
                H1[b, j] = H0[b, j]
                C1[b, j] = C0[b, j]
            for s in range(S):
                for j in range(4 * H):
                    gates[j] = X[b, S - 1 - s if backwards else s, j]
                for k in range(H):
                    for j in range(4 * H):
                        gates[j] = gates[j] + H1[b, k] * W[k, j]
                for j in range(H):
                    C1[b, j] = C1[b, j] / (T.float32(1) + T.exp(-gates[H + j])) + T.tanh(gates[2 * H + j]) / (
                        T.float32(1) + T.exp(-gates[j])
                    )
                    H1[b, j] = T.tanh(C1[b, j]) / (T.float32(1) + T.exp(-gates[3 * H + j]))
                    Y[b, S - 1 - s if backwards else s, j] = H1[b, j]

    return steps


TABLE: dict[Any, Convert] = {_aten.lstm.input: _lstm}
