"""Grouped matrix products: the rows of each expert times its own matrix, by register tiles over packed panels.

Two kernels. ``make_rows`` writes one result a sorted row, with bias and activation; it reads the rows where they are,
through the slots of a dispatch, or sorted already. ``make_scatter`` adds each result, times the weight of its slot, to
the row of its token. Both walk the groups of a plan (see ``dispatch``) expert by expert, so that the rows of one expert
stay in a core's cache while panels pass, and a panel while tiles of rows pass.

Threads never write one place: in ``make_rows`` they share panels of experts, in ``make_scatter`` they own columns of
the result, or rows where a token has one slot only. So a result does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.activations import lookup
from moeify.backends.tvm.cpu.dispatch import wide
from moeify.backends.tvm.cpu.product import At, Finish, Grouped, Product

# Shares of the work that threads divide among them: a multiple of most numbers of cores.
_SHARES = 192
# What a panel costs before its first row, in rows: reading it from memory.
_PANEL_ROWS = 4


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
        product = Product(spec, handles, x)
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
        product = Product(spec, handles, x)
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


def _share_panels(product: Product, rows: Any, source: At, finish: Finish) -> None:
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


def _own_columns(product: Product, y: Any, source: At, finish: Finish) -> None:
    """The same, where a thread has the same columns in every group; the result begins as zero."""
    if product.spec.panels == 1:  # a loop of one is no loop to TVM, and a region of threads must have one
        _columns_of(product, y, 1, source, finish, T.serial)
        return
    # One region of threads around a serial loop of groups: each takes the same panels every time, without a barrier.
    with T.attr(tirx.const(0, "int32"), "pragma_parallel_launch_point", 1):
        _columns_of(product, y, product.spec.panels, source, finish, T.parallel)


def _columns_of(product: Product, y: Any, panels: int, source: At, finish: Finish, loop: Any) -> None:
    count = tirx.const(panels, "int64")
    with loop(0, count) as panel, T.serial(0, y.shape[0]) as token:
        _store(product.spec, panel, lambda j: tirx.const(0, "float32"), y, token)
    with T.serial(0, product.plan.groups()) as group, loop(0, count) as panel:
        product.panel(group, panel, source, finish)
