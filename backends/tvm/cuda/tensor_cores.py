"""Tensor-core instructions in the place of the blocks that describe them.

The schedule primitive for this, ``Schedule.tensorize``, ends the process with a segmentation fault in TVM 0.27.0 (in its
copy of the intrinsic), so the blocks are replaced here, with TVM's own intrinsics for wmma m16n16k16.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.tensor_intrin.cuda import (
    get_wmma_fill_intrin,
    get_wmma_load_intrin,
    get_wmma_store_intrin,
    get_wmma_sync_intrin,
)

from moeify.backends.tvm.cuda.statements import rewrite
from moeify.backends.tvm.cuda.tiles import FRAGMENT

_SIZE = (FRAGMENT, FRAGMENT, FRAGMENT)
_SHARED = "shared.dyn"


def _implementation(name: str) -> tirx.PrimFunc:
    """A fresh copy each time: its buffers become the block's own."""
    half, wide = "float16", "float32"
    if name == "wmma_clear":
        return get_wmma_fill_intrin(*_SIZE, wide)[1]
    if name == "wmma_load_a":
        return get_wmma_load_intrin(*_SIZE, half, _SHARED, False, False)[1]
    if name == "wmma_load_b":
        return get_wmma_load_intrin(*_SIZE, half, _SHARED, True, True)[1]
    if name == "wmma_store":
        return get_wmma_store_intrin(*_SIZE, wide, _SHARED)[1]
    assert name == "wmma_multiply", name
    return get_wmma_sync_intrin(*_SIZE, half, wide, True)[1]


def use_tensor_cores(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with every block named ``wmma_*`` replaced by the instruction that does what it says."""

    def replace(block: Any) -> Any:
        if not isinstance(block, s_tir.SBlock) or not block.name_hint.startswith("wmma_"):
            return block
        made = _implementation(block.name_hint)
        regions = _regions(block)
        buffers = [made.buffer_map[param] for param in made.params]
        assert len(buffers) == len(regions), block.name_hint
        inner = made.body.block.body
        if isinstance(inner, s_tir.SBlockRealize):
            inner = inner.block
        while isinstance(inner, s_tir.SBlock):
            inner = inner.body
        matches = [s_tir.MatchBufferRegion(b, r) for b, r in zip(buffers, regions, strict=True)]
        return s_tir.SBlock([], block.reads, block.writes, block.name_hint, inner, None, [], matches, {})

    return function.with_body(rewrite(function.body, replace))


def _regions(block: Any) -> list[Any]:
    """The block's operands in the order of the intrinsic's parameters: sources, then what it writes."""
    if block.name_hint == "wmma_multiply":
        sums, a, b = block.reads
        return [a, b, sums]
    return [*block.reads, *block.writes]
