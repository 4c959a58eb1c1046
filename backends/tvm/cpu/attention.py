"""Attention that holds the scores of a few queries at a time, never of all: those of one register tile.

Two kernels. The first packs the keys in panels, once for all queries and all heads that share them. The second has
threads over heads and queries, and walks over tiles of queries: scores of all keys by register tiles, the softmax of
each row, and the sum of values by register tiles. Keys and values of a head stay in cache while tiles pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.mathematics import exp
from moeify.backends.tvm.cpu.matmul import write
from moeify.backends.tvm.cpu.rowwise import Lanes, add, each, vectors
from moeify.backends.tvm.cpu.tiles import Sums, few_row_tiles, share, shares
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.machine import Machine, Tile
from moeify.backends.tvm.sizes import in_kernel, made_by, same_size, spelled
from moeify.backends.tvm.types import tensor_type

_ZERO = tirx.const(0.0, "float32")
_LOWEST = tirx.const(float("-inf"), "float32")


@dataclass(frozen=True)
class Case:
    """The constants of an attention kernel. Sizes are numbers or expressions, of which only "not a number" counts.

    ``swapped``: which of q, k and v lie in memory as [B, S, H, D], as linear layers leave them.
    """

    q: tuple[Any, ...]  # B, H, S, Dk
    v: tuple[Any, ...]  # B, G, L, Dv
    mask: tuple[Any, ...] | None
    mask_dtype: str
    causal: bool
    scale: float
    swapped: tuple[bool, bool, bool]

    @property
    def name(self) -> str:
        words = [spelled(self.q[1:]), spelled(self.v[1:]), f"scale{self.scale!r}".replace(".", "p").replace("-", "m")]
        words += ["causal"] if self.causal else []
        words += [] if self.mask is None else [f"mask{spelled(self.mask)}_{self.mask_dtype}"]
        return "_".join([*words, "".join("s" if s else "p" for s in self.swapped)])


def attention(emitter: Emitter, q: Any, k: Any, v: Any, mask: Any | None, causal: bool, scale: float) -> Any:
    """``softmax(q k^T * scale + mask) v`` in float32: [B, H, S, Dv]. Rows that see no key are zeros.

    Gives None for other types, head sizes that are not numbers, and masks that are neither bool nor float32.
    """
    shapes = [shape_of(x) for x in (q, k, v)]
    fixed = [shapes[0][1], shapes[0][3], shapes[1][1], shapes[2][3]]
    if any(dtype_of(x) != "float32" for x in (q, k, v)) or not all(isinstance(size, int) for size in fixed):
        return None
    if mask is not None and (dtype_of(mask) not in ("float32", "bool") or len(shape_of(mask)) > 4):
        return None
    if any(len(shape) != 4 for shape in shapes) or not _masks(mask, shapes):
        return None
    found = [_unswapped(emitter, x) for x in (q, k, v)]
    case = Case(
        tuple(shapes[0]),
        tuple(shapes[2]),
        None if mask is None else tuple(shape_of(mask)),
        "" if mask is None else dtype_of(mask),
        causal,
        scale,
        (found[0][1], found[1][1], found[2][1]),
    )
    batch, heads, queries, _ = case.q
    groups, depth, length = shapes[1][1], shapes[1][3], shapes[1][2]
    machine = emitter.machine
    columns = machine.tile.columns
    panels = (length + (columns - 1)) // columns
    keys = emitter.call(
        emitter.kernel(
            f"attention_keys_{groups}x{spelled([length])}x{depth}_{'s' if case.swapped[1] else 'p'}",
            lambda: make_keys(shapes[1], columns, swapped=case.swapped[1]),
        ),
        [found[1][0]],
        tensor_type((batch, groups, panels, depth, columns), "float32"),
    )
    y = emitter.call(
        emitter.kernel(f"attention_{case.name}", lambda: make(case, machine)),
        [found[0][0], keys, found[2][0], *([] if mask is None else [mask])],
        tensor_type((batch, queries, heads, case.v[3]), "float32"),
    )
    return emitter.emit(relax.op.permute_dims(y, [0, 2, 1, 3]))


def _unswapped(emitter: Emitter, x: Any) -> tuple[Any, bool]:
    """What ``x`` is the transpose of, where heads were moved before positions: it can be read where it is."""
    call = made_by(emitter, x, "relax.permute_dims")
    if call is not None and call.attrs.axes is not None and [int(a) for a in call.attrs.axes] == [0, 2, 1, 3]:
        return call.args[0], True
    return x, False


def _masks(mask: Any | None, shapes: list[list[Any]]) -> bool:
    """Whether each size of the mask is 1 or that of the scores."""
    if mask is None:
        return True
    scores = [*shapes[0][:3], shapes[1][2]]
    sizes = shape_of(mask)
    return all(m == 1 or same_size(m, s) for m, s in zip(sizes, scores[4 - len(sizes) :], strict=True))


def make_keys(shape: list[Any], columns: int, *, swapped: bool) -> tirx.PrimFunc:
    """``(k [B, G, L, D], packed [B, G, ceil(L / columns), D, columns])``, zeros after the last key."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("k", "packed")]
        batch, groups, length, depth = in_kernel([None, *shape[1:]])
        panels = -(-length // columns) if isinstance(length, int) else T.int64()
        k = T.match_buffer(handles[0], _order([batch, groups, length, depth], swapped), "float32")
        packed = T.match_buffer(handles[1], (batch, groups, panels, depth, columns), "float32")
        with T.parallel(0, batch * groups * panels) as task:
            panel = T.bind(tirx.floormod(task, panels))
            group = T.bind(tirx.floormod(tirx.floordiv(task, panels), groups))
            b = T.bind(tirx.floordiv(task, panels * groups))

            def column(j: Any) -> None:
                key = panel * columns + j
                with T.serial(0, depth) as d:
                    T.buffer_store(packed, k[_at(b, group, key, d, swapped)], [b, group, panel, d, j])

            with T.serial(0, columns) as j, T.If(panel * columns + j < length):
                with T.Then():
                    column(j)
                with T.Else(), T.serial(0, depth) as d:
                    T.buffer_store(packed, _ZERO, [b, group, panel, d, j])
    return builder.get()


def _order(sizes: list[Any], swapped: bool) -> list[Any]:
    return [sizes[0], sizes[2], sizes[1], sizes[3]] if swapped else sizes


def _at(b: Any, head: Any, position: Any, d: Any, swapped: bool) -> tuple[Any, ...]:
    return (b, position, head, d) if swapped else (b, head, position, d)


def make(case: Case, machine: Machine) -> tirx.PrimFunc:
    """``(q, packed keys, v, mask where there is one, y [B, S, H, Dv])``."""
    tile = machine.tile
    heads, depth, groups, width = case.q[1], case.q[3], case.v[1], case.v[3]
    splits = shares(heads, machine)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("q", "k", "v", "mask", "y") if case.mask or name != "mask"]
        batch, _, queries, _ = in_kernel([None, *case.q[1:]])
        length = case.v[2] if isinstance(case.v[2], int) else T.int64()
        panels = -(-length // tile.columns) if isinstance(length, int) else T.int64()
        q = T.match_buffer(handles[0], _order([batch, heads, queries, depth], case.swapped[0]), "float32")
        keys = T.match_buffer(handles[1], (batch, groups, panels, depth, tile.columns), "float32")
        v = T.match_buffer(handles[2], _order([batch, groups, length, width], case.swapped[2]), "float32")
        mask = T.match_buffer(handles[3], in_kernel(case.mask), case.mask_dtype) if case.mask else None
        y = T.match_buffer(handles[-1], (batch, queries, heads, width), "float32")
        kernel = _Kernel(case, tile, q, keys, v, mask, y, length, panels)
        with T.parallel(0, batch * heads * splits) as task:
            head = T.bind(tirx.floormod(tirx.floordiv(task, splits), heads))
            b = T.bind(tirx.floordiv(task, splits * heads))
            first, last = share(queries, tirx.floormod(task, splits), splits, tile.rows)
            scores = T.alloc_buffer((tile.rows, panels * tile.columns), "float32")
            few_row_tiles(first, last, tile.rows, lambda start, n: kernel.tile(b, head, start, n, scores))
    return builder.get()


class _Kernel:
    """One tile of queries: scores, softmax, values."""

    def __init__(
        self, case: Case, tile: Tile, q: Any, keys: Any, v: Any, mask: Any, y: Any, length: Any, panels: Any
    ) -> None:
        self.case, self.tile_size = case, tile
        self.q, self.keys, self.v, self.mask, self.y = q, keys, v, mask, y
        self.length, self.panels = length, panels
        self.group_size = case.q[1] // case.v[1]

    def tile(self, b: Any, head: Any, start: Any, n: int, scores: Any) -> None:
        columns = self.tile_size.columns
        group = T.bind(tirx.floordiv(head, self.group_size))
        # No query of the tile sees a key after this one.
        seen = T.bind(tirx.min(self.length, start + n)) if self.case.causal else self.length
        panels = T.bind(tirx.floordiv(seen + (columns - 1), columns)) if self.case.causal else self.panels
        self._scores(b, head, group, start, n, scores, seen, panels)
        scales = T.alloc_buffer((n,), "float32")
        with T.serial(0, n) as i:
            T.buffer_store(scales, _softmax(scores, i, panels, columns), [i])
        self._values(b, head, group, start, n, scores, seen, scales)

    def _scores(self, b: Any, head: Any, group: Any, start: Any, n: int, scores: Any, seen: Any, panels: Any) -> None:
        columns = self.tile_size.columns
        with T.serial(0, panels) as panel:
            sums = Sums(n, columns)
            sums.set(lambda i, j: _ZERO)
            at = lambda i, d: self.q[_at(b, head, start + i, d, self.case.swapped[0])]  # noqa: E731
            with T.serial(0, self.case.q[3]) as d:
                sums.multiply_add(lambda i: at(i, d), lambda j: self.keys[b, group, panel, d, j])
            first = T.bind(panel * columns)

            def store(i: int, key: Any, value: Any) -> None:
                T.buffer_store(scores, self._masked(b, head, start + i, key, value), [i, key])

            write(sums, first, seen, store)
            with T.If(first + columns > seen), T.Then():
                for i in range(n):
                    with T.serial(seen, first + columns) as key:
                        T.buffer_store(scores, _LOWEST, [i, key])

    def _masked(self, b: Any, head: Any, query: Any, key: Any, value: Any) -> Any:
        value = value * tirx.const(self.case.scale, "float32")
        if self.case.causal:
            value = tirx.Select(tirx.Cast("int64", key) <= query, value, _LOWEST)
        if self.mask is None:
            return value
        sizes = self.case.mask or ()
        at = [b, head, query, key][4 - len(sizes) :]
        here = self.mask[tuple(0 if size == 1 else i for size, i in zip(sizes, at, strict=True))]
        return tirx.Select(here, value, _LOWEST) if self.case.mask_dtype == "bool" else value + here

    def _values(self, b: Any, head: Any, group: Any, start: Any, n: int, scores: Any, seen: Any, scales: Any) -> None:
        def panel(first: Any, lanes: int) -> None:
            sums = Sums(n, lanes)
            sums.set(lambda i, j: _ZERO)
            with T.serial(0, seen) as key:
                right = lambda j: self.v[_at(b, group, key, first + j, self.case.swapped[2])]  # noqa: E731
                sums.multiply_add(lambda i: scores[i, key], right)
            for i in range(n):
                self._store(sums, i, scales[i], [b, start + i, head], first, lanes)

        vectors(self.case.v[3], self.tile_size.columns, panel)

    def _store(self, sums: Sums, i: int, scale: Any, at: list[Any], first: Any, lanes: int) -> None:
        each(lanes, lambda j: T.buffer_store(self.y, sums[i, j] * scale, [*at, first + j]))


def _softmax(scores: Any, i: Any, panels: Any, columns: int) -> Any:
    """Scores of one row become exponentials; gives the reciprocal of their sum. Columns are whole panels."""
    top = Lanes(columns, float("-inf"), tirx.max)
    with T.serial(0, panels) as p:
        top.add(lambda j: scores[i, p * columns + j], columns)
    largest = top.result()
    # A row that sees no key has nothing to subtract, and -inf less -inf would be no number.
    largest = T.bind(tirx.Select(largest == _LOWEST, _ZERO, largest))
    total = Lanes(columns, 0.0, add)
    with T.serial(0, panels) as p:
        at = p * columns
        each(columns, lambda j: T.buffer_store(scores, exp(scores[i, at + j] - largest), [i, at + j]))
        total.add(lambda j: scores[i, at + j], columns)
    result = total.result()
    return tirx.Select(result == _ZERO, _ZERO, tirx.const(1.0, "float32") / result)
