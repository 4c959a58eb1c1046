"""Grouped products: each tile of rows times the matrix of the expert that has them.

Weights are read as the program stores them, [E, out, in]: the rows of gate and up are interleaved on their way into
shared memory, so that one thread has both sums of a hidden unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from moeify.backends.tvm.cuda.activations import TABLE
from moeify.backends.tvm.cuda.building import argument, each, function, size, vector
from moeify.backends.tvm.cuda.product import Operand, Product
from moeify.backends.tvm.cuda.tiles import BlockTile, ceildiv, tile_for


@dataclass(frozen=True)
class Grouped:
    """``inner`` -> ``outer`` units of each of ``experts`` experts, in ``dtype`` with float32 sums.

    ``gather`` k > 0: sorted row r is token ``order[r] // k``; 0: row r. ``scatter`` k > 0: results are weighted and
    summed into tokens; 0: they stay sorted. ``bias`` and ``gate_bias``: [experts, outer].
    """

    experts: int
    inner: int
    outer: int
    dtype: str
    gather: int = 0
    scatter: int = 0
    gated: bool = False
    bias: bool = False
    gate_bias: bool = False
    activation: str = "identity"

    @property
    def tile(self) -> BlockTile:
        return tile_for(self.dtype)

    @property
    def name(self) -> str:
        flags = [
            *([f"from_k{self.gather}"] if self.gather else []),
            *([f"to_k{self.scatter}"] if self.scatter else []),
            *(["gated"] if self.gated else []),
            *(["bias"] if self.bias else []),
            *(["gate_bias"] if self.gate_bias else []),
        ]
        return "_".join([f"e{self.experts}_{self.inner}_{self.outer}_{self.activation}", *flags, self.dtype])


def make_grouped(spec: Grouped) -> tirx.PrimFunc:
    """The arguments are, where they apply:

    ``(rows, order [R], tiles [M, 3], weights [T, K], gate, up, gate bias, bias, partial [R, outer] float32, result)``.
    """
    with function() as builder:
        total, number = size(None, "rows"), size(None, "tiles")
        tokens = size(None, "tokens") if spec.gather or spec.scatter else total
        if spec.gather or spec.scatter:
            total = tokens * (spec.gather or spec.scatter)
        x = argument("x", (tokens if spec.gather else total, spec.inner), spec.dtype)
        order: Any = argument("order", (total,), "int32") if spec.gather or spec.scatter else None
        tiles = argument("tiles", (number, 3), "int32")
        weights: Any = argument("weights", (tokens, spec.scatter), spec.dtype) if spec.scatter else None
        matrix = (spec.experts, spec.outer, spec.inner)
        gate = argument("gate", matrix, spec.dtype) if spec.gated else None
        up = argument("up", matrix, spec.dtype)
        gate_bias = argument("gate_bias", matrix[:2], spec.dtype) if spec.gate_bias else None
        bias = argument("bias", matrix[:2], spec.dtype) if spec.bias else None
        partial = argument("partial", (total, spec.outer), "float32") if spec.scatter > 1 else None
        result = argument("result", (tokens if spec.scatter else total, spec.outer), spec.dtype)

        tile, zero, group = spec.tile, T.Cast(spec.dtype, 0), 2 if spec.gated else 1
        width = tile.columns // group  # outputs of a block

        def left(t: Any) -> Operand:
            def read(row: Any, k: Any) -> Any:
                place = _wide(tiles[t, 1]) + row
                source = _wide(order[place]) // spec.gather if spec.gather else place
                return T.if_then_else(place < _wide(tiles[t, 2]), x[source, k], zero)

            return Operand(read, vector(spec.inner, spec.dtype))

        def right(t: Any, j: Any) -> Operand:
            def read(row: Any, k: Any) -> Any:
                place = [_wide(tiles[t, 0]), j * width + row // group, k]
                value = up[*place] if gate is None else T.if_then_else(row % 2 == 0, gate[*place], up[*place])
                return T.if_then_else(place[1] < spec.outer, value, zero)

            return Operand(read, vector(spec.inner, spec.dtype))

        def finish(t: Any, j: Any, row: Any, column: Any, sums: Any) -> None:
            place, o, expert = _wide(tiles[t, 1]) + row, j * width + column, _wide(tiles[t, 0])
            with B.If(tirx.all(place < _wide(tiles[t, 2]), o < spec.outer)), B.Then():
                value = _biased(sums(group - 1), bias, expert, o)
                if gate is None:
                    value = TABLE[spec.activation](value)
                else:
                    value = TABLE[spec.activation](_biased(sums(0), gate_bias, expert, o)) * value
                if not spec.scatter:
                    B.buffer_store(result, T.Cast(spec.dtype, value), [place, o])
                    return
                slot = _wide(order[place])
                scaled = value * T.Cast("float32", weights[slot // spec.scatter, slot % spec.scatter])
                if partial is None:
                    B.buffer_store(result, T.Cast(spec.dtype, scaled), [slot, o])
                else:
                    B.buffer_store(partial, scaled, [slot, o])

        def used(t: Any) -> Any:
            return T.Cast("int32", tiles[t, 1] < tiles[t, 2])

        columns = ceildiv(spec.outer, width)
        Product(tile, spec.dtype, number, columns, spec.inner, left, right, finish, used, group).emit()
        if partial is not None:
            with each(tokens * spec.outer) as i:
                t, o = i // spec.outer, i % spec.outer
                combined = partial[t * spec.scatter, o]
                for k in range(1, spec.scatter):
                    combined = combined + partial[t * spec.scatter + k, o]
                B.buffer_store(result, T.Cast(spec.dtype, combined), [t, o])
    return builder.get()


def _biased(value: Any, bias: Any, expert: Any, o: Any) -> Any:
    return value if bias is None else value + T.Cast("float32", bias[expert, o])


def _wide(value: Any) -> Any:
    return tirx.Cast("int64", value)
