"""Linear layers on the CPU: the weight packed in panels as wide as the register tile, threads over panels."""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu import activations, packing
from moeify.backends.tvm.cpu.tiles import Sums, row_tiles, share, shares
from moeify.backends.tvm.emitter import Emitter, dtype_of, rows
from moeify.backends.tvm.machine import Machine, Tile
from moeify.backends.tvm.types import tensor_type


def linear(emitter: Emitter, x: Any, weight: str, bias: str | None, activation: str = "identity") -> Any:
    """``activation(x @ weight.T + bias)`` in float32. Gives None for other types."""
    value = emitter.weights.source(weight)
    if dtype_of(x) != "float32" or value.dtype != torch.float32:
        return None
    outputs, depth = value.shape
    machine = emitter.machine
    flat, leading = rows(emitter, x)
    arguments = [flat, packed(emitter, weight)]
    if bias is not None:
        arguments.append(padded(emitter, bias))
    name = f"linear_{outputs}x{depth}_{activation}{'_bias' if bias is not None else ''}"
    kernel = emitter.kernel(name, lambda: make(outputs, depth, machine, bias=bias is not None, activation=activation))
    y = emitter.call(kernel, arguments, tensor_type((flat.ty.shape.values[0], outputs), "float32"))
    return y if len(leading) == 1 else emitter.emit(relax.op.reshape(y, (*leading, outputs)))


def packed(emitter: Emitter, weight: str) -> Any:
    """The weight [O, D] as panels [ceil(O / columns), D, columns], zeros after the last output."""
    columns = emitter.machine.tile.columns
    source = emitter.weights.source
    outputs, depth = source(weight).shape
    shape = (packing.count(outputs, columns), depth, columns)
    pack = lambda: packing.panels(source(weight), columns)  # noqa: E731
    return emitter.weights.packed(weight, f"panels{columns}", shape, torch.float32, pack)


def padded(emitter: Emitter, bias: str) -> Any:
    """The bias with zeros up to whole panels."""
    columns = emitter.machine.tile.columns
    source = emitter.weights.source
    (outputs,) = source(bias).shape
    width = packing.count(outputs, columns) * columns
    pad = lambda: packing.padded(source(bias), columns).float()  # noqa: E731
    return emitter.weights.packed(bias, f"padded{columns}", (width,), torch.float32, pad)


def make(outputs: int, depth: int, machine: Machine, *, bias: bool, activation: str = "identity") -> tirx.PrimFunc:
    """``y[T, outputs] = activation(x[T, depth] @ w + b)``, with ``w`` packed as ``packed`` says."""
    tile = machine.tile
    panels = packing.count(outputs, tile.columns)
    splits = shares(panels, machine)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("x", "w", "b", "y") if bias or name != "b"]
        tokens = T.int64()
        x = T.match_buffer(handles[0], (tokens, depth), "float32")
        w = T.match_buffer(handles[1], (panels, depth, tile.columns), "float32")
        b = T.match_buffer(handles[2], (panels * tile.columns,), "float32") if bias else None
        y = T.match_buffer(handles[-1], (tokens, outputs), "float32")
        with T.parallel(0, panels * splits) as task:
            panel = tirx.floordiv(task, splits)
            first, last = share(tokens, tirx.floormod(task, splits), splits, tile.rows)
            emit = lambda at, n: _tile(x, w, b, y, panel, at, n, tile, activation)  # noqa: E731
            row_tiles(first, last, tile.rows, emit)
    return builder.get()


def _tile(x: Any, w: Any, b: Any, y: Any, panel: Any, start: Any, n: int, tile: Tile, activation: str) -> None:
    """One tile: ``n`` rows from ``start`` times one panel."""
    outputs = int(y.shape[1])
    function = activations.lookup(activation)
    sums = Sums(n, tile.columns)
    sums.set(lambda i, j: b[panel * tile.columns + j] if b is not None else tirx.const(0, "float32"))
    with T.serial(0, x.shape[1]) as k:
        sums.multiply_add(lambda i: x[start + i, k], lambda j: w[panel, k, j])
    if activation != "identity":
        sums.set(lambda i, j: function(sums[i, j]))
    full, rest = divmod(outputs, tile.columns)
    if rest == 0:
        sums.store(y, start, panel * tile.columns, tile.columns)
        return
    with T.If(panel < full):
        with T.Then():
            sums.store(y, start, panel * tile.columns, tile.columns)
        with T.Else():
            sums.store(y, start, full * tile.columns, rest)
