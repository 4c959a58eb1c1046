"""Grouped matrix products: the rows of each expert times its own matrix, by register tiles over packed panels.

Two kernels. ``make_rows`` writes one result a sorted row, with bias and activation; it reads the rows where they are,
through the slots of a dispatch, or sorted already. ``make_scatter`` adds each result, times the weight of its slot, to
the row of its token. Both walk the groups of a plan (see ``dispatch``) expert by expert, so that the rows of one expert
stay in a core's cache while panels pass, and a panel while tiles of rows pass.

Threads never write one place: in ``make_rows`` they share panels of experts, in ``make_scatter`` they own columns of
the result, or rows where a token has one slot only. So a result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.activations import lookup
from moeify.backends.tvm.cpu.dispatch import Plan, plan_size, wide
from moeify.backends.tvm.cpu.packing import count, stored_dtype, widened
from moeify.backends.tvm.cpu.tiles import Sums
from moeify.backends.tvm.machine import Tile
from moeify.backends.tvm.types import dtype_name

At = Callable[[Any], Any]
# Emits what is done with the sums of one row: the panel, the sorted row, its sums by column.
Finish = Callable[[Any, Any, At], None]

# Shares of the work that threads divide among them: a multiple of most numbers of cores.
_SHARES = 192
# What a panel costs before its first row, in rows: reading it from memory.
_PANEL_ROWS = 4


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


def make_rows(spec: Grouped) -> tirx.PrimFunc:
    """``(x, plan, slots where k, w, bias where there is one, out [R, out_width])``.

    x is [T, depth] with slots and [R, depth] without.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        names = ["x", "plan", *(["slots"] if spec.k else []), "w", *(["bias"] if spec.bias else []), "out"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        tokens, rows = T.int64(), T.int64()
        x = T.match_buffer(handles["x"], (tokens if spec.k else rows, spec.stride or spec.depth), "float32")
        slots = T.match_buffer(handles["slots"], (rows,), "int32") if spec.k else None
        product = _Product(spec, handles, x)
        out = T.match_buffer(handles["out"], (rows, spec.out_width), "float32")

        def source(row: Any) -> Any:
            return row if slots is None else wide(tirx.floordiv(slots[row], spec.k))

        def finish(panel: Any, row: Any, sums: At) -> None:
            _store(spec, panel, lambda j: _activated(spec, sums, j), out, row)

        _share_panels(product, rows, source, finish)
    return builder.get()


def make_scatter(spec: Grouped) -> tirx.PrimFunc:
    """``(rows [R, depth], plan, slots, weights [T, k], w, bias where there is one, y [T, width])``."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        names = ["rows", "plan", "slots", "weights", "w", *(["bias"] if spec.bias else []), "y"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        tokens, rows = T.int64(), T.int64()
        x = T.match_buffer(handles["rows"], (rows, spec.stride or spec.depth), "float32")
        slots = T.match_buffer(handles["slots"], (rows,), "int32")
        weights = T.match_buffer(handles["weights"], (tokens, spec.k), "float32")
        product = _Product(spec, handles, x)
        y = T.match_buffer(handles["y"], (tokens, spec.width), "float32")

        def finish(panel: Any, row: Any, sums: At) -> None:
            slot = T.bind(slots[row])
            token = T.bind(wide(tirx.floordiv(slot, spec.k)))
            weight = T.bind(weights[token, wide(tirx.floormod(slot, spec.k))])

            def value(j: Any) -> Any:
                here = weight * sums(j)
                return here if spec.k == 1 else y[token, panel * spec.columns + j] + here

            _store(spec, panel, value, y, token)

        if spec.k == 1:
            _share_panels(product, rows, lambda row: row, finish)
        else:
            _own_columns(product, y, lambda row: row, finish)
    return builder.get()


class _Product:
    """The operands that both kernels have, and the inner loop."""

    def __init__(self, spec: Grouped, handles: dict[str, Any], x: Any) -> None:
        self.spec = spec
        self.x = x
        self.plan = Plan(T.match_buffer(handles["plan"], (plan_size(spec.experts),), "int32"), spec.experts)
        self.w = T.match_buffer(handles["w"], spec.packed_shape, dtype_name(stored_dtype(spec.dtype)))
        self.bias = T.match_buffer(handles["bias"], spec.bias_shape, "float32") if spec.bias else None

    def panel(self, group: Any, panel: Any, source: At, finish: Finish) -> None:
        """Emit all rows of a group times one panel: row ``r`` of the group is row ``source(r)`` of x.

        The rows are cut into as few tiles as they fit, as even as they go; each number of rows has its own code.
        What comes after the sums (``finish``) is there once, in a loop: activations are long.
        """
        rows, columns = self.spec.tile.rows, self.spec.tile.columns
        expert = T.bind(self.plan.expert(group))
        start = T.bind(self.plan.start(group))
        size = T.bind(self.plan.start(group + 1) - start)
        tiles = T.bind(tirx.floordiv(size + (rows - 1), rows))
        done = T.alloc_buffer((rows, columns), "float32", scope="local")
        with T.serial(0, tiles) as tile:
            first = T.bind(start + tirx.floordiv(size * tile, tiles))
            n = T.bind(start + tirx.floordiv(size * (tile + 1), tiles) - first)
            for known in range(1, rows + 1):
                with T.If(n == known), T.Then():
                    at = [T.bind(source(first + i)) for i in range(known)]
                    ahead = _Ahead(self, expert, panel, tile, tiles)
                    self._sums(expert, panel, at, ahead).store(done, 0, 0, columns)
            with T.serial(0, n) as i:
                finish(panel, first + i, lambda j, i=i: done[i, j])

    def _sums(self, expert: Any, panel: Any, at: list[Any], ahead: Any) -> Sums:
        """The sums of these rows of x."""
        spec, columns = self.spec, self.spec.tile.columns
        sums = Sums(len(at), columns)
        zero = tirx.const(0, "float32")
        sums.set(lambda i, j: zero if self.bias is None else self.bias[expert, panel * columns + j])
        with T.serial(0, tirx.const(spec.depth, "int64")) as k:
            ahead.step(k)
            sums.multiply_add(lambda i: self.x[at[i], k], lambda j: widened(self.w[expert, panel, k, j], spec.dtype))
        return sums


class _Ahead:
    def __init__(self, product: _Product, expert: Any, panel: Any, tile: Any, tiles: Any) -> None:
        self.w = product.w
        depth = product.spec.depth
        self.expert = expert
        self.panel = T.bind(tirx.min(panel + 1, tirx.const(product.spec.panels - 1, "int64")))
        self.scale = T.bind(tirx.floordiv(tirx.const(1 << 16, "int64"), tiles))
        self.first = T.bind(tile * depth)

    def step(self, k: Any) -> None:
        line = ((self.first + k) * self.scale) >> tirx.const(16, "int64")
        address = tirx.address_of(self.w[self.expert, self.panel, line, 0])
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))


def _activated(spec: Grouped, sums: At, j: Any) -> Any:
    function = lookup(spec.activation)
    return function(sums(j)) * sums(j + spec.columns) if spec.gated else function(sums(j))


def _store(spec: Grouped, panel: Any, value: Any, out: Any, row: Any) -> None:
    """Write one row of a tile, as many columns as the result has."""

    def write(width: int) -> None:
        with T.vectorized(0, width) as j:
            T.buffer_store(out, value(j), [row, panel * spec.columns + j])

    full, rest = divmod(spec.out_width, spec.columns)
    if rest == 0:
        write(spec.columns)
    else:
        with T.If(panel < full):
            with T.Then():
                write(spec.columns)
            with T.Else():
                write(rest)


def _share_panels(product: _Product, rows: Any, source: At, finish: Finish) -> None:
    """Every panel of every group once: shares of equal cost, each a run of panels of one expert after another."""
    spec, plan = product.spec, product.plan
    panels = tirx.const(spec.panels, "int64")
    with T.parallel(0, tirx.const(_SHARES, "int64")) as share:
        groups = T.bind(plan.groups())
        total = T.bind((rows + groups * _PANEL_ROWS) * panels)
        with T.serial(0, groups) as group:
            start = T.bind(plan.start(group))
            before = T.bind((start + group * _PANEL_ROWS) * panels)
            cost = T.bind(plan.start(group + 1) - start + _PANEL_ROWS)

            def bound(share: Any, before: Any = before, cost: Any = cost) -> Any:
                """The first panel of this group that begins at or after the share does."""
                here = tirx.floordiv(tirx.floordiv(share * total, _SHARES) - before + cost - 1, cost)
                return T.bind(tirx.max(tirx.min(here, panels), tirx.const(0, "int64")))

            with T.serial(bound(share), bound(share + 1)) as panel:
                product.panel(group, panel, source, finish)


def _own_columns(product: _Product, y: Any, source: At, finish: Finish) -> None:
    """The same, where a thread has the same columns in every group; the result begins as zero."""
    if product.spec.panels == 1:  # a loop of one is no loop to TVM, and a region of threads must have one
        _columns_of(product, y, 1, source, finish, T.serial)
        return
    # One region of threads around a serial loop of groups: each takes the same panels every time, without a barrier.
    with T.attr(tirx.const(0, "int32"), "pragma_parallel_launch_point", 1):
        _columns_of(product, y, product.spec.panels, source, finish, T.parallel)


def _columns_of(product: _Product, y: Any, panels: int, source: At, finish: Finish, loop: Any) -> None:
    count = tirx.const(panels, "int64")
    with loop(0, count) as panel, T.serial(0, y.shape[0]) as token:
        _store(product.spec, panel, lambda j: tirx.const(0, "float32"), y, token)
    with T.serial(0, product.plan.groups()) as group, loop(0, count) as panel:
        product.panel(group, panel, source, finish)
