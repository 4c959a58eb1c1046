"""Parts of tensors, and tensors of parts: slices, concatenation, padding, windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tvm import relax, te, tirx

from moeify.backends.tvm.conversions.translation import Convert, Translation, prim, rank_of
from moeify.backends.tvm.emitter import shape_of

_aten = torch.ops.aten
_op = relax.op


def _slice(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dim, step = args["dim"] % rank_of(args), args["step"]
    size = t.size(args["self"].meta["val"].shape[dim])
    start = bound(t, args["start"], size, 0)
    return sliced(t, t.tensor(args["self"]), dim, start, t.shape(node)[dim], step)


def bound(t: Translation, value: Any, size: Any, default: Any) -> Any:
    """Where a slice begins: negative values count from the end, and what is outside is moved to the edge."""
    if value is None:
        return default
    start = t.size(value)
    if isinstance(start, int) and isinstance(size, int):
        return min(max(start + size if start < 0 else start, 0), size)
    if isinstance(start, int):
        return t.symbols.simplify(tirx.max(size + start, 0)) if start < 0 else start
    return start


def sliced(t: Translation, x: Any, dim: int, start: Any, length: Any, step: int = 1) -> Any:
    """``length`` elements of an axis from ``start`` on."""
    size = shape_of(x)[dim]
    if step == 1 and isinstance(start, int) and start == 0 and t.symbols.equal(size, length):
        return x
    shape = shape_of(x)
    shape[dim] = length

    def take(data: te.Tensor, begin: Any, count: Any) -> te.Tensor:
        return te.compute(
            [count if axis == dim else s for axis, s in enumerate(data.shape)],
            lambda *i: data(*(begin + index * step if axis == dim else index for axis, index in enumerate(i))),
            name="slice",
        )

    fixed = all(isinstance(s, int) for s in (start, length))
    if fixed and isinstance(size, int):
        end = min(start + (length - 1) * step + 1, size) if length else start
        return t.emit(_op.strided_slice(x, axes=[dim], begin=[start], end=[end], strides=[step]))
    return t.emitter.builder.emit_te(take, x, prim(start), prim(length))


def _select(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    dim = args["dim"] % rank_of(args)
    size = t.size(args["self"].meta["val"].shape[dim])
    index = t.size(args["index"])
    if isinstance(index, int) and index < 0:
        index = t.symbols.simplify(size + index)
    return t.reshape(sliced(t, t.tensor(args["self"]), dim, index, 1), t.shape(node))


def _cat(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value = node.meta["val"]
    # A tensor of shape [0] may be concatenated with anything.
    parts = [arg for arg in args["tensors"] if arg.meta["val"].dim() == value.dim()]
    dim = args["dim"] % value.dim()
    return joined(t, [t.tensor(arg, value.dtype) for arg in parts], dim, t.shape(node)[dim])


def joined(t: Translation, parts: Sequence[Any], dim: int, length: Any) -> Any:
    """Tensors one after the other along an axis, which is ``length`` long then."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(length, int):
        return t.emit(_op.concat(list(parts), dim))
    # Relax's own concat spells a symbolic length in another way than its readers do, which FuseTIR takes for an error.
    return t.emitter.builder.emit_te(_side_by_side, list(parts), dim, length)


def _side_by_side(parts: Sequence[te.Tensor], dim: int, length: Any) -> te.Tensor:
    def element(*i: Any) -> Any:
        end: Any = 0
        pieces = []
        for part in parts:
            begin, end = end, end + part.shape[dim]
            pieces.append((end, part(*(at - begin if axis == dim else at for axis, at in enumerate(i)))))
        result = pieces[-1][1]
        for end, piece in reversed(pieces[:-1]):
            result = tirx.if_then_else(i[dim] < end, piece, result)
        return result

    shape = [length if axis == dim else size for axis, size in enumerate(parts[0].shape)]
    return te.compute(shape, element, name="concatenate")


def _stack(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value = node.meta["val"]
    dim = args["dim"] % value.dim()
    shape = t.shape(node)
    shape[dim] = 1
    return t.emit(_op.concat([t.reshape(t.tensor(arg, value.dtype), shape) for arg in args["tensors"]], dim))


def _split(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """split, split_with_sizes, chunk, tensor_split and unbind: slices as long as torch says."""
    dim = args["dim"] % rank_of(args)
    x, start, parts = t.tensor(args["self"]), 0, []
    for value in node.meta["val"]:
        shape = t.sizes(list(value.shape))
        length = 1 if node.target == _aten.unbind.int else shape[dim]
        parts.append(t.reshape(sliced(t, x, dim, start, length), shape))
        start = t.symbols.simplify(start + length)
    return parts


def _roll(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    if not args["dims"]:
        return NotImplemented
    rank = rank_of(args)
    x = t.tensor(args["self"])
    for shift, dim in zip(t.sizes(args["shifts"]), args["dims"], strict=True):
        size = shape_of(x)[dim % rank]
        first = t.symbols.simplify(tirx.floormod(prim(-shift), prim(size)))
        rest = t.symbols.simplify(size - first)
        tail, head = sliced(t, x, dim % rank, first, rest), sliced(t, x, dim % rank, 0, first)
        x = joined(t, [tail, head], dim % rank, size)
    return x


def _pad(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    if args.get("mode", "constant") != "constant":
        return NotImplemented
    pads = t.sizes(args["pad"])
    rank = rank_of(args)
    before, after = [0] * rank, [0] * rank
    for place in range(len(pads) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = pads[2 * place], pads[2 * place + 1]
    x = t.tensor(args["self"])
    value = float(args.get("value") or 0)
    for dim in range(rank):  # a negative width cuts
        cut = [-width if isinstance(width, int) and width < 0 else 0 for width in (before[dim], after[dim])]
        if any(cut):
            x = sliced(t, x, dim, cut[0], t.symbols.simplify(shape_of(x)[dim] - sum(cut)))
            before[dim], after[dim] = max(before[dim], 0), max(after[dim], 0)
    if all(isinstance(width, int) and width == 0 for width in (*before, *after)):
        return x
    return t.emitter.builder.emit_te(_framed, x, [prim(w) for w in before], [prim(s) for s in t.shape(node)], value)


def _framed(data: te.Tensor, before: Sequence[Any], shape: Sequence[Any], value: float) -> te.Tensor:
    def element(*i: Any) -> Any:
        at = [index - width for index, width in zip(i, before)]
        inside = [tirx.all(place >= 0, place < size) for place, size in zip(at, data.shape)]
        return tirx.if_then_else(tirx.all(*inside), data(*at), tirx.const(value, data.dtype))

    return te.compute(shape, element, name="pad")


def _unfold(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """Windows of an axis, which become the last axis: x.unfold(dim, size, step)."""
    dim, step = args["dimension"] % rank_of(args), args["step"]
    shape = [prim(s) for s in t.shape(node)]

    def windows(data: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            return data(*(index * step + i[-1] if axis == dim else index for axis, index in enumerate(i[:-1])))

        return te.compute(shape, element, name="windows")

    return t.emitter.builder.emit_te(windows, t.tensor(args["self"]))


TABLE: dict[Any, Convert] = {
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.cat.default: _cat,
    _aten.concat.default: _cat,
    _aten.stack.default: _stack,
    _aten.roll.default: _roll,
    _aten.pad.default: _pad,
    _aten.constant_pad_nd.default: _pad,
    _aten.unfold.default: _unfold,
    **dict.fromkeys(
        (
            _aten.split.Tensor,
            _aten.split_with_sizes.default,
            _aten.chunk.default,
            _aten.tensor_split.sections,
            _aten.unbind.int,
        ),
        _split,
    ),
}
