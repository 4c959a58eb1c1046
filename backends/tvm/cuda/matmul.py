"""Dense products on CUDA: linear layers and products of computed tensors, by the kernel that experts have too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from moeify.backends.tvm.cuda.activations import TABLE
from moeify.backends.tvm.cuda.building import argument, at_least_one, function, size, vector
from moeify.backends.tvm.cuda.product import Operand, Product
from moeify.backends.tvm.cuda.tiles import tile_for

Size = int | None  # None: only known when it runs


@dataclass(frozen=True)
class Dense:
    """``a [S, M, K]`` times ``b``: ``[S / share, N, K]`` where ``by_rows``, else ``[S / share, K, N]``.

    Matrix s of ``a`` meets matrix ``s // share`` of ``b``; one matrix for all where ``share`` is 0. The result is of
    type ``out``, and ``bias`` is [N].
    """

    m: Size
    n: Size
    k: Size
    dtype: str
    out: str
    by_rows: bool = True
    share: int = 1
    bias: bool = False
    activation: str = "identity"

    @property
    def name(self) -> str:
        sizes = "x".join("any" if s is None else str(s) for s in (self.m, self.n, self.k))
        flags = [*(["bias"] if self.bias else []), *([] if self.by_rows else ["columns"])]
        return "_".join([sizes, f"share{self.share}", self.activation, *flags, self.dtype, self.out])


Finish = Callable[[Any, Any, Any, Any], Any]  # (matrix, row, column, sum) -> value


def make_dense(spec: Dense, extra: Callable[[Any, Any, Any], Finish] | None = None) -> tirx.PrimFunc:
    """``(a, b, bias where there is one, result [S, M, N])``.

    ``extra(S, M, N)`` may declare further arguments, which come before the result, and gives what becomes of a sum.
    """
    with function() as builder:
        batch, m, n, k = size(None, "batch"), size(spec.m, "m"), size(spec.n, "n"), size(spec.k, "k")
        others = size(None, "others") if spec.share else size(1)
        a = argument("a", (batch, m, k), spec.dtype)
        b = argument("b", (others, n, k) if spec.by_rows else (others, k, n), spec.dtype)
        bias = argument("bias", (n,), spec.dtype) if spec.bias else None
        change = extra(batch, m, n) if extra else None
        result = argument("result", (batch, m, n), spec.out)
        tile, zero = tile_for(spec.dtype), T.Cast(spec.dtype, 0)
        blocks = at_least_one((m + (tile.rows - 1)) // tile.rows)  # of one matrix

        # Not the operators // and %, which round down: a size might be negative for all that TVM knows.
        def matrix_of(t: Any) -> Any:
            return tirx.truncdiv(t, blocks)

        def first_row(t: Any) -> Any:
            return tirx.truncmod(t, blocks) * tile.rows

        def left(t: Any) -> Operand:
            def read(row: Any, depth: Any) -> Any:
                i = first_row(t) + row
                return T.if_then_else(tirx.all(i < m, matrix_of(t) < batch), a[matrix_of(t), i, depth], zero)

            return Operand(read, vector(spec.k, spec.dtype))

        def right(t: Any, j: Any) -> Operand:
            matrix = matrix_of(t) // spec.share if spec.share else 0

            def read(row: Any, depth: Any) -> Any:
                c = j * tile.columns + row
                value = b[matrix, c, depth] if spec.by_rows else b[matrix, depth, c]
                return T.if_then_else(tirx.all(c < n, matrix_of(t) < batch), value, zero)

            if spec.by_rows:
                return Operand(read, vector(spec.k, spec.dtype))
            return Operand(read, vector(spec.n, spec.dtype), along="row")

        def finish(t: Any, j: Any, row: Any, column: Any, sums: Any) -> None:
            s, i, c = matrix_of(t), first_row(t) + row, j * tile.columns + column
            with B.If(tirx.all(s < batch, i < m, c < n)), B.Then():
                value = sums(0)
                if bias is not None:
                    value = value + T.Cast("float32", bias[c])
                value = TABLE[spec.activation](value)
                if change is not None:
                    value = change(s, i, c, value)
                B.buffer_store(result, T.Cast(spec.out, value), [s, i, c])

        columns = at_least_one((n + (tile.columns - 1)) // tile.columns)
        Product(tile, spec.dtype, at_least_one(batch * blocks), columns, k, left, right, finish).emit()
    return builder.get()
