"""LSTM and GRU: the products with the input are one linear layer of the whole sequence, the steps one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Cell:
    """What a step is: how many rows of weights a hidden unit has, and how many values it hands to the next step.

    ``steps(width, backwards)`` makes the kernel: the products with the input [B, S, gates * H], the hidden weight
    [H, gates * H], its bias [gates * H] and the states to begin with [B, H] give all hidden values [B, S, H] and the
    last states [B, H].
    """

    name: str
    gates: int
    states: int
    steps: Callable[[int, bool], tirx.PrimFunc]


def _recurrent(cell: _Cell) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        params, biased, layers = args["params"], args["has_biases"], args["num_layers"]
        ways = 2 if args["bidirectional"] else 1
        each = 4 if biased else 2
        value = args["input"].meta["val"]
        fits = len(params) == each * layers * ways and value.dim() == 3 and value.dtype == torch.float32
        if args["train"] or not fits or any(t.name(param) is None for param in params):
            return NotImplemented  # a projection of the hidden value, weights that are computed
        if t.emitter.machine.kind == "cuda":
            return NotImplemented  # the kernels are loops of a CPU
        x = t.tensor(args["input"])
        x = x if args["batch_first"] else permuted(t, x, [1, 0, 2])
        given = [args["hx"]] if cell.states == 1 else args["hx"]
        states = [t.tensor(state) for state in given]
        ends: list[list[Any]] = [[] for _ in states]
        for layer in range(layers):
            outs = []
            for way in range(ways):
                place = layer * ways + way
                own = params[place * each : (place + 1) * each]
                begin = [_row(t, state, place) for state in states]
                out, *end = _layer(t, cell, x, own, begin, backwards=way == 1)
                outs.append(out)
                for gathered, one in zip(ends, end, strict=True):
                    gathered.append(t.reshape(one, [1, *shape_of(one)]))
            width = sum(int(shape_of(out)[2]) for out in outs)
            x = joined(t, outs, 2, width)
        x = x if args["batch_first"] else permuted(t, x, [1, 0, 2])
        return [x, *(joined(t, gathered, 0, layers * ways) for gathered in ends)]

    return convert


def _row(t: Translation, states: Any, place: int) -> Any:
    return t.reshape(sliced(t, states, 0, place, 1), shape_of(states)[1:])


def _layer(
    t: Translation, cell: _Cell, x: Any, params: Sequence[fx.Node], begin: list[Any], backwards: bool
) -> list[Any]:
    """One direction of one layer: all hidden values, and the last of each state."""
    inner, outer, *biases = params
    name = t.name(inner)
    assert name is not None
    inputs = by_name(t, None, x, name, biases[0] if biases else None)
    width = int(outer.meta["val"].shape[1])
    turned = t.emitter.weights.plain(t.constants.derive(outer, "T", lambda w: w.t()))
    no_bias = relax.op.zeros((cell.gates * width,), "float32")
    bias = t.tensor(biases[1]) if biases else t.emit(no_bias)
    batch, length, _ = shape_of(inputs)
    direction = "backwards" if backwards else "forwards"
    kernel = t.emitter.kernel(f"{cell.name}_{direction}_{width}", lambda: cell.steps(width, backwards))
    ends = [tensor_type((batch, width), "float32")] * cell.states
    types = [tensor_type((batch, length, width), "float32"), *ends]
    result = t.emitter.call(kernel, [inputs, turned, bias, *begin], types)
    return [t.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]


def _lstm_steps(H: int, backwards: bool) -> tirx.PrimFunc:
    """The recurrence, of batch rows in parallel. Gates are in torch's order: input, forget, cell, output."""

    @T.prim_func(s_tir=True)
    def steps(
        inputs: T.handle, outer: T.handle, bias: T.handle, begin_h: T.handle, begin_c: T.handle,
        out: T.handle, end_h: T.handle, end_c: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(inputs, (B, S, 4 * H), "float32")
        W = T.match_buffer(outer, (H, 4 * H), "float32")
        bias_h = T.match_buffer(bias, (4 * H,), "float32")
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
                    gates[j] = X[b, S - 1 - s if backwards else s, j] + bias_h[j]
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


def _gru_steps(H: int, backwards: bool) -> tirx.PrimFunc:
    """The recurrence, of batch rows in parallel. Gates are in torch's order: reset, update, new.

    The reset gate multiplies the hidden product with its bias, which is why that bias is not in ``inputs``.
    """

    @T.prim_func(s_tir=True)
    def steps(
        inputs: T.handle, outer: T.handle, bias: T.handle, begin_h: T.handle, out: T.handle, end_h: T.handle
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        B = T.int64()
        S = T.int64()
        X = T.match_buffer(inputs, (B, S, 3 * H), "float32")
        W = T.match_buffer(outer, (H, 3 * H), "float32")
        bias_h = T.match_buffer(bias, (3 * H,), "float32")
        H0 = T.match_buffer(begin_h, (B, H), "float32")
        Y = T.match_buffer(out, (B, S, H), "float32")
        H1 = T.match_buffer(end_h, (B, H), "float32")
        for b in T.parallel(B):
            gates = T.alloc_buffer((3 * H,), "float32")
            for j in range(H):
                H1[b, j] = H0[b, j]
            for s in range(S):
                for j in range(3 * H):
                    gates[j] = bias_h[j]
                for k in range(H):
                    for j in range(3 * H):
                        gates[j] = gates[j] + H1[b, k] * W[k, j]
                for j in range(2 * H):
                    gates[j] = T.float32(1) / (
                        T.float32(1) + T.exp(-(gates[j] + X[b, S - 1 - s if backwards else s, j]))
                    )
                for j in range(H):
                    gates[2 * H + j] = T.tanh(
                        X[b, S - 1 - s if backwards else s, 2 * H + j] + gates[j] * gates[2 * H + j]
                    )
                    H1[b, j] = gates[2 * H + j] + gates[H + j] * (H1[b, j] - gates[2 * H + j])
                    Y[b, S - 1 - s if backwards else s, j] = H1[b, j]

    return steps


TABLE: dict[Any, Convert] = {
    _aten.lstm.input: _recurrent(_Cell("lstm", 4, 2, _lstm_steps)),
    _aten.gru.input: _recurrent(_Cell("gru", 3, 1, _gru_steps)),
}
