"""Tensor-core instructions (wmma m16n16k16) in the place of the blocks that describe them.

``Schedule.tensorize`` would do this, but in TVM 0.27.0 it ends the process with a segmentation fault, and importing
TVM's own table of intrinsics takes minutes of CPU time: it parses hundreds of functions.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.script import tirx as T

from moeify.backends.tvm.cuda.statements import rewrite
from moeify.backends.tvm.cuda.tiles import FRAGMENT

_SIZE = (FRAGMENT, FRAGMENT, FRAGMENT)


def use_tensor_cores(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with every block named ``wmma_*`` replaced by the instruction that does what the block says."""

    def replace(node: Any) -> Any:
        if not isinstance(node, s_tir.SBlock) or not node.name_hint.startswith("wmma_"):
            return node
        regions = [*node.reads, *(r for r in node.writes if node.name_hint != "wmma_multiply")]
        views = [_view(region) for region in regions]
        call = _INSTRUCTIONS[node.name_hint](*views)
        matches = [s_tir.MatchBufferRegion(v, r) for v, r in zip(views, regions, strict=True)]
        body = tirx.Evaluate(call)
        return s_tir.SBlock([], node.reads, node.writes, node.name_hint, body, None, [], matches, {})

    return function.with_body(rewrite(function.body, replace))


def _view(region: Any) -> Any:
    """A 16 x 16 part of a buffer, whose place and row length are known when the buffers are laid out."""
    source = region.source
    strides = [tirx.Var("row_stride", "int32"), tirx.Var("column_stride", "int32")]
    return tirx.decl_buffer(
        (FRAGMENT, FRAGMENT),
        str(source.dtype),
        "part",
        strides=strides,
        elem_offset=tirx.Var("offset", "int32"),
        scope=source.scope(),
        data_alignment=64,
        offset_factor=FRAGMENT,
    )


def _index(part: Any) -> Any:
    """Which fragment of an array of fragments this is."""
    row = part.strides[0]
    return part.elem_offset // row // FRAGMENT * (row // FRAGMENT) + part.elem_offset % row // FRAGMENT


def _clear(sums: Any) -> Any:
    return T.tvm_fill_fragment(sums.data, *_SIZE, _index(sums), T.float32(0), dtype="void")


def _load(order: str) -> Any:
    def load(source: Any, target: Any) -> Any:
        pointer = source.access_ptr("r", ptr_type=str(source.dtype))
        place = (target.data, *_SIZE, _index(target))
        return T.tvm_load_matrix_sync(*place, pointer, source.strides[0], order, dtype="void")

    return load


def _store(sums: Any, target: Any) -> Any:
    pointer = target.access_ptr("w", ptr_type=str(target.dtype))
    place = (sums.data, *_SIZE, _index(sums))
    return T.tvm_store_matrix_sync(*place, pointer, target.strides[0], "row_major", dtype="void")


def _multiply(sums: Any, a: Any, b: Any) -> Any:
    operands = [value for part in (sums, a, b, sums) for value in (part.data, _index(part))]
    return T.tvm_mma_sync(*operands, dtype="void")


# The right operand is kept by columns, [columns, depth], which is a matrix_b in column-major order.
_INSTRUCTIONS = {
    "wmma_clear": _clear,
    "wmma_load_a": _load("row_major"),
    "wmma_load_b": _load("col_major"),
    "wmma_store": _store,
    "wmma_multiply": _multiply,
}
