"""ATen operators that torch.onnx does not translate, or translates to what ONNX Runtime does not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset23

_aten = torch.ops.aten
op: Any = opset23  # its stubs know the types of values, which these functions take as they come

# TopK of opset 23 does not take these in the standard or in the runtime; the wider type has the same order.
_SORTED_AS = {
    ir.DataType.BFLOAT16: ir.DataType.FLOAT,
    ir.DataType.BOOL: ir.DataType.INT32,
    ir.DataType.INT8: ir.DataType.INT32,
    ir.DataType.UINT8: ir.DataType.INT32,
    ir.DataType.INT16: ir.DataType.INT32,
}


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK of the whole axis: among equal values ONNX puts the lower index first, so it is a stable sort."""
    wide = _SORTED_AS.get(x.dtype)
    values, order = _ordered(op.Cast(x, to=wide) if wide is not None else x, dim, descending)
    return (op.Cast(values, to=x.dtype) if wide is not None else values), order


def _ordered(x: Any, dim: int = -1, descending: bool = False) -> Any:
    size = op.Shape(x, start=dim) if dim == -1 else op.Shape(x, start=dim, end=dim + 1)
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _rank(x: Any) -> Any:
    """The place of each element in the stable ascending order of the last axis."""
    _, order = _ordered(x)
    # A permutation sorted is the identity; where its elements came from is its inverse.
    return _ordered(order)[1]


def _argmax(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The first of the largest. ONNX Runtime's ArgMax gives the whole axis, not one index, where another is empty."""
    rank, axis = len(x.shape), 0 if dim is None else dim
    if rank == 0:
        return op.Constant(value_int=0)
    if dim is None:
        x = op.Reshape(x, op.Constant(value_ints=[-1]))
    wide = _SORTED_AS.get(x.dtype)
    _, found = op.TopK(op.Cast(x, to=wide) if wide is not None else x, op.Constant(value_ints=[1]), axis=axis)
    if not keepdim:
        return op.Squeeze(found, op.Constant(value_ints=[axis]))
    return found if dim is not None else op.Reshape(found, op.Constant(value_ints=[1] * rank))


def _searchsorted(
    sorted_sequence: Any,
    values: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """How many elements of the sequence lie before each value.

    In the stable order of values and sequence together that is a value's rank, less its rank among the values alone;
    whichever stands first wins ties. N log N, where comparing all with all is N * M.
    """
    shape, is_line = op.Shape(values), len(sorted_sequence.shape) == 1
    if sorter is not None:
        sorted_sequence = op.GatherElements(sorted_sequence, sorter, axis=-1)
    if is_line:
        values = op.Reshape(values, op.Constant(value_ints=[-1]))
    count = op.Shape(values, start=-1)
    if right or side == "right":
        both = op.Concat(sorted_sequence, values, axis=-1)
        start, end = op.Shape(sorted_sequence, start=-1), op.Shape(both, start=-1)
    else:
        both = op.Concat(values, sorted_sequence, axis=-1)
        start, end = op.Constant(value_ints=[0]), count
    rank = op.Slice(_rank(both), start, end, op.Constant(value_ints=[-1]))
    found = op.Reshape(op.Sub(rank, _rank(values)), shape)
    return op.Cast(found, to=ir.DataType.INT32) if out_int32 else found


def _bucketize(values: Any, boundaries: Any, out_int32: bool = False, right: bool = False) -> Any:
    return _searchsorted(boundaries, values, out_int32, right)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The Attention operator, given a mask of its last two sizes.

    torch.onnx hands on masks that broadcast, such as a padding mask [B, 1, 1, S], and refuses one head of keys for
    many of queries; the runtime refuses the first, and takes the second. Rows without any key are zero in both.
    ``dropout_p`` is that of a program in eval mode, 0.
    """
    heads, rank = [query, key, value], len(query.shape)
    if rank > 4 or not rank == len(key.shape) == len(value.shape):
        raise NotImplementedError(f"attention over {rank} dimensions")  # to_onnx makes a NotExportable of it
    lead = op.Constant(value_ints=list(range(4 - rank)))
    if rank < 4:  # [L, D] and [B, L, D] are [1, 1, L, D] and [1, B, L, D]
        query, key, value = (op.Unsqueeze(x, lead) for x in heads)
    if attn_mask is not None and not _fits(attn_mask, heads[0], heads[1]):
        sizes = op.Concat(op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), axis=0)
        attn_mask = op.Expand(attn_mask, sizes)
    y = op.Attention(query, key, value, attn_mask, scale=scale, is_causal=int(is_causal))[0]
    return op.Squeeze(y, lead) if rank < 4 else y


def _fits(mask: Any, query: Any, key: Any) -> bool:
    """Whether the mask's last two sizes are known to be those of the scores."""
    return mask.shape[-2] == query.shape[-2] and mask.shape[-1] == key.shape[-2]


TRANSLATIONS: Mapping[Callable, Callable] = {
    _aten.argmax.default: _argmax,
    _aten.sort.stable: _sort,
    _aten.searchsorted.Tensor: _searchsorted,
    _aten.bucketize.Tensor: _bucketize,
    _aten.scaled_dot_product_attention.default: _attention,
}
