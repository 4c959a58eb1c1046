"""Which rows each expert has: a stable counting sort of the chosen experts, and the tiles of the grouped products.

Letters as in ``families``; R = T * K rows (copies of tokens), slot ``t * K + k`` of the k-th expert of token t.

Every step is a launch in which threads do not wait for each other: chosen experts are counted in pieces of 256 slots,
the counts of an expert are summed over the pieces, and a slot's place is what comes before its piece plus how often its
expert stands before it in the piece.

``tiles`` is int32 [M, 3]: expert, first sorted row, and where the expert's rows end, for each tile of at most ``rows``
rows of one expert; tiles that are not needed end at 0. There are at most ``max_tiles`` whatever the routing.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from moeify.backends.tvm.cuda.building import argument, at_least_one, each, function, scratch, size
from moeify.backends.tvm.emitter import Emitter, shape_of
from moeify.backends.tvm.types import tensor_type

_PIECE = 256


def max_tiles(total: Any, experts: int, rows: int) -> Any:
    """Of ``total`` rows: each expert that has rows starts a tile, and the others fill tiles of ``rows``."""
    least = tirx.min(total, tirx.const(experts, "int64"))
    return at_least_one((total - least) // rows + least)


def dispatch(emitter: Emitter, experts: Any, num_experts: int, rows: int) -> tuple[Any, Any, Any]:
    """``(order [R], tiles [M, 3], counts [E])``, all int32. ``experts`` is [T, K] int64.

    An expert that does not exist is taken as the nearest one that does: a kernel cannot raise.
    """
    tokens, k = shape_of(experts)
    total = tokens * k
    kernel = emitter.kernel(f"moe_dispatch_e{num_experts}_k{k}_rows{rows}", lambda: make_dispatch(num_experts, k, rows))
    pieces = at_least_one((total + (_PIECE - 1)) // _PIECE)
    shapes = [(pieces, num_experts), (num_experts,), (num_experts,), (max_tiles(total, num_experts, rows), 3), (total,)]
    found = emitter.call(kernel, [experts], [tensor_type(shape, "int32") for shape in shapes])
    _, counts, _, tiles, order = (emitter.emit(found[i]) for i in range(5))
    return order, tiles, counts


def tiles_of_counts(emitter: Emitter, counts: Any, total: Any, num_experts: int, rows: int) -> Any:
    """``tiles [M, 3]`` of ``total`` rows that are sorted already; ``counts`` is [E] int64."""
    kernel = emitter.kernel(f"moe_plan_e{num_experts}_rows{rows}", lambda: make_plan(num_experts, rows))
    shapes = [(num_experts,), (num_experts,), (max_tiles(total, num_experts, rows), 3)]
    found = emitter.call(kernel, [counts], [tensor_type(shape, "int32") for shape in shapes])
    return emitter.emit(found[2])


def make_dispatch(num_experts: int, k: int, rows: int) -> tirx.PrimFunc:
    """``(experts [T, K], before [C, E], counts [E], offsets [E], tiles [M, 3], order [T * K])``."""
    with function() as builder:
        tokens, pieces, number = size(None, "tokens"), size(None, "pieces"), size(None, "tiles")
        chosen = argument("experts", (tokens, k), "int64")
        before = argument("before", (pieces, num_experts), "int32")
        counts = argument("counts", (num_experts,), "int32")
        offsets = argument("offsets", (num_experts,), "int32")
        tiles = argument("tiles", (number, 3), "int32")
        order = argument("order", (tokens * k,), "int32")
        total = tokens * k

        def expert(slot: Any) -> Any:
            value = chosen[slot // k, slot % k]
            return tirx.max(tirx.min(value, tirx.const(num_experts - 1, "int64")), tirx.const(0, "int64"))

        with each(pieces * num_experts) as i:
            run, piece, e = scratch(1, "int32"), i // num_experts, i % num_experts
            B.buffer_store(run, T.int32(0), [0])
            first = piece * _PIECE
            with B.serial(tirx.min(total - first, tirx.const(_PIECE, "int64"))) as s:
                B.buffer_store(run, run[0] + tirx.Cast("int32", expert(first + s) == e), [0])
            B.buffer_store(before, run[0], [piece, e])
        with each(tirx.const(num_experts, "int64")) as e:
            run = scratch(2, "int32")
            B.buffer_store(run, T.int32(0), [0])
            with B.serial(pieces) as piece:
                B.buffer_store(run, before[piece, e], [1])
                B.buffer_store(before, run[0], [piece, e])
                B.buffer_store(run, run[0] + run[1], [0])
            B.buffer_store(counts, run[0], [e])
        _plan(counts, offsets, tiles, num_experts, rows, number)
        with each(total) as slot:
            run, piece = scratch(1, "int32"), slot // _PIECE
            e = expert(slot)
            B.buffer_store(run, offsets[e] + before[piece, e], [0])
            with B.serial(slot - piece * _PIECE) as s:
                B.buffer_store(run, run[0] + tirx.Cast("int32", expert(piece * _PIECE + s) == e), [0])
            B.buffer_store(order, tirx.Cast("int32", slot), [run[0]])
    return builder.get()


def make_plan(num_experts: int, rows: int) -> tirx.PrimFunc:
    """``(counts [E] int64, counts [E], offsets [E], tiles [M, 3])``."""
    with function() as builder:
        number = size(None, "tiles")
        given = argument("counts", (num_experts,), "int64")
        counts = argument("narrow", (num_experts,), "int32")
        offsets = argument("offsets", (num_experts,), "int32")
        tiles = argument("tiles", (number, 3), "int32")
        with each(tirx.const(num_experts, "int64")) as e:
            B.buffer_store(counts, tirx.Cast("int32", given[e]), [e])
        _plan(counts, offsets, tiles, num_experts, rows, number)
    return builder.get()


def _plan(counts: Any, offsets: Any, tiles: Any, num_experts: int, rows: int, number: Any) -> None:
    """Emit where the rows of each expert begin, and which tiles they make."""
    with each(tirx.const(num_experts, "int64")) as e:
        run = scratch(1, "int32")
        B.buffer_store(run, T.int32(0), [0])
        with B.serial(e) as other:
            B.buffer_store(run, run[0] + counts[other], [0])
        B.buffer_store(offsets, run[0], [e])
    with each(number) as i:
        run = scratch(1, "int32")  # tiles of the experts before
        B.buffer_store(run, T.int32(0), [0])
        for column in range(3):
            B.buffer_store(tiles, T.int32(0), [i, column])
        tile = tirx.Cast("int32", i)
        with B.serial(num_experts) as e:
            mine = (counts[e] + (rows - 1)) // rows
            with B.If(tirx.all(tile >= run[0], tile < run[0] + mine)), B.Then():
                B.buffer_store(tiles, tirx.Cast("int32", e), [i, 0])
                B.buffer_store(tiles, offsets[e] + (tile - run[0]) * rows, [i, 1])
                B.buffer_store(tiles, offsets[e] + counts[e], [i, 2])
            B.buffer_store(run, run[0] + mine, [0])
