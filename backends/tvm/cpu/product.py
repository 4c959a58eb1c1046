"""The inner loops of grouped products: one panel of an expert's matrix times all of its rows, by register tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.dispatch import Plan, plan_size
from moeify.backends.tvm.cpu.packing import count, stored_dtype, widened
from moeify.backends.tvm.cpu.tiles import Sums
from moeify.backends.tvm.machine import Tile
from moeify.backends.tvm.types import dtype_name

At = Callable[[Any], Any]
# Emits what is done with the sums of one row: the panel, the sorted row, its sums by column.
Finish = Callable[[Any, Any, At], None]

_SHARE_BITS = 16  # of a fixed-point fraction
_TO_READ_IN_L2 = (0, 2, 1)  # arguments of llvm.prefetch: a read, locality 2 of 0 to 3, data


@dataclass(frozen=True)
class Grouped:
    """The constants of a kernel: ``width`` outputs of ``depth`` inputs in each of ``experts``.

    ``k`` slots a token, 0 where the rows are sorted already. ``stride`` is the width of the rows that are read, at
    least ``depth``, and 0 for that. ``padded``: the result has whole panels of columns, the last of them without
    meaning.
    """

    experts: int
    depth: int
    width: int
    tile: Tile
    k: int = 0
    stride: int = 0
    dtype: torch.dtype = torch.float32
    bias: bool = False
    gated: bool = False
    activation: str = "identity"
    padded: bool = False

    @property
    def columns(self) -> int:
        """Outputs of one panel."""
        return self.tile.columns // 2 if self.gated else self.tile.columns

    @property
    def panels(self) -> int:
        return count(self.width, self.columns)

    @property
    def out_width(self) -> int:
        return self.panels * self.columns if self.padded else self.width

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        return (self.experts, self.panels, self.depth, self.tile.columns)

    @property
    def bias_shape(self) -> tuple[int, int]:
        return (self.experts, self.panels * self.tile.columns)

    @property
    def name(self) -> str:
        """All constants, for the name of the kernel."""
        words = [f"e{self.experts}_{self.width}x{self.depth}", dtype_name(self.dtype), self.activation]
        words += [f"k{self.k}"] if self.k else []
        words += [f"of{self.stride}"] if self.stride else []
        words += [word for word in ("bias", "gated", "padded") if getattr(self, word)]
        return "_".join([*words, f"{self.tile.rows}x{self.tile.columns}"])


class Product:
    """The operands that both kernels have, and the inner loop."""

    def __init__(self, spec: Grouped, handles: dict[str, Any], x: Any) -> None:
        self.spec = spec
        self.x = x
        self.plan = Plan(T.match_buffer(handles["plan"], (plan_size(spec.experts),), "int32"), spec.experts)
        self.w = T.match_buffer(handles["w"], spec.packed_shape, dtype_name(stored_dtype(spec.dtype)))
        self.bias = T.match_buffer(handles["bias"], spec.bias_shape, "float32") if spec.bias else None

    def panel(self, group: Any, panel: Any, source: At, finish: Finish) -> None:
        """Emit all rows of a group times one panel: row ``r`` of the group is row ``source(r)`` of x.

        The rows are cut into as few tiles as they fit, as even as they go. Each number of rows has its own code; where
        the tile is large, a number in between has that of the next, with its last row computed twice.
        What comes after the sums (``finish``) is there once, in a loop: activations are long.
        """
        rows, columns = self.spec.tile.rows, self.spec.tile.columns
        counts = _row_counts(rows)
        expert = T.bind(self.plan.expert(group))
        start = T.bind(self.plan.start(group))
        size = T.bind(self.plan.start(group + 1) - start)
        tiles = T.bind(tirx.floordiv(size + (rows - 1), rows))
        done = T.alloc_buffer((rows, columns), "float32", scope="local")
        with T.serial(0, tiles) as tile:
            first = T.bind(start + tirx.floordiv(size * tile, tiles))
            n = T.bind(start + tirx.floordiv(size * (tile + 1), tiles) - first)
            last = T.bind(first + n - 1)
            for fewer, known in zip([0, *counts], counts, strict=False):
                with T.If(tirx.all(n > fewer, n <= known)), T.Then():
                    at = [T.bind(source(tirx.min(first + i, last) if i > fewer else first + i)) for i in range(known)]
                    ahead = _Ahead(self, expert, panel, tile, tiles)
                    self._sums(expert, panel, at, ahead).store(done, 0, 0, columns)
            with T.serial(0, n) as i:
                finish(panel, first + i, partial(lambda i, j: done[i, j], i))

    def _sums(self, expert: Any, panel: Any, at: list[Any], ahead: _Ahead) -> Sums:
        """The sums of these rows of x, fetching ahead."""
        spec, columns = self.spec, self.spec.tile.columns
        sums = Sums(len(at), columns)
        zero = tirx.const(0, "float32")
        sums.set(lambda i, j: zero if self.bias is None else self.bias[expert, panel * columns + j])
        with T.serial(0, tirx.const(spec.depth, "int64")) as k:
            ahead.step(k)
            sums.multiply_add(lambda i: self.x[at[i], k], lambda j: widened(self.w[expert, panel, k, j], spec.dtype))
        return sums


def _row_counts(rows: int) -> list[int]:
    """The numbers of rows that have code of their own."""
    return [n for n in range(1, rows + 1) if n <= 6 or n % 2 == 0 or n == rows]


class _Ahead:
    """Fetches the panel after this one into the second level of cache while the tiles of this one are computed.

    A panel of few rows would otherwise wait for memory first and compute afterwards. Each tile of rows asks for its
    share of the panel, one line of weights a step, so that requests come no faster than the tiles pass.
    """

    def __init__(self, product: Product, expert: Any, panel: Any, tile: Any, tiles: Any) -> None:
        self.w = product.w
        self.expert = expert
        self.panel = T.bind(tirx.min(panel + 1, tirx.const(product.spec.panels - 1, "int64")))
        self.first = T.bind(tile * product.spec.depth)
        self.share = T.bind(tirx.floordiv(tirx.const(1 << _SHARE_BITS, "int64"), tiles))  # of a line, a step

    def step(self, k: Any) -> None:
        line = ((self.first + k) * self.share) >> tirx.const(_SHARE_BITS, "int64")
        address = tirx.address_of(self.w[self.expert, self.panel, line, 0])
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, *_TO_READ_IN_L2))
