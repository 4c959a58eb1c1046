"""Operators that read or write where other tensors say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tvm import relax, te, tirx

from moeify.backends.tvm.conversions.slices import bound
from moeify.backends.tvm.conversions.translation import Convert, Translation, prim, rank_of

_aten = torch.ops.aten
_op = relax.op


def _embedding(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    return _taken(t, node, t.tensor(args["weight"]), args["indices"], 0)


def _index_select(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    return _taken(t, node, t.tensor(args["self"]), args["index"], args["dim"] % rank_of(args))


def _taken(t: Translation, node: fx.Node, data: Any, index: fx.Node, dim: int) -> Any:
    """Clipped to the data: a wrong index cannot read memory that is not its own."""
    return t.emit(_op.take(data, t.tensor(index), axis=dim, mode="clip"))


def _gather(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    rank = rank_of(args)
    dim = args["dim"] % rank if rank else 0

    def pick(data: te.Tensor, index: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            at = _inside(index(*i), data.shape[dim])
            return data(*(at if axis == dim else place for axis, place in enumerate(i)))

        return te.compute(index.shape, element, name="gather")

    return t.emitter.builder.emit_te(pick, t.tensor(args["self"]), t.tensor(args["index"]))


def _inside(index: Any, size: Any) -> Any:
    """Negative indices count from the end; what is outside is moved to the edge, as no kernel may read beyond."""
    wrapped = tirx.if_then_else(index < 0, index + size, index)
    return tirx.max(tirx.min(wrapped, size - 1), 0)


def _index(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """``x[i, :, j]`` of integer tensors, which broadcast; their axes come where the first was, or in front when a
    slice stands between two of them.
    """
    given: Sequence[Any] = args["indices"]
    rank = rank_of(args)
    places = [axis for axis, index in enumerate(given) if index is not None]
    if any(given[axis].meta["val"].dtype == torch.bool for axis in places):
        return NotImplemented  # the shape depends on the values
    indices = [t.tensor(given[axis]) for axis in places]
    width = max(given[axis].meta["val"].dim() for axis in places)
    together = places == list(range(places[0], places[-1] + 1))
    front = places[0] if together else 0
    shape = [prim(s) for s in t.shape(node)]

    def pick(data: te.Tensor, *tables: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            chosen, rest = i[front : front + width], iter((*i[:front], *i[front + width :]))
            at = dict(zip(places, (_inside(_read(table, chosen), data.shape[p]) for p, table in zip(places, tables))))
            return data(*(at[axis] if axis in at else next(rest) for axis in range(rank)))

        return te.compute(shape, element, name="index")

    return t.emitter.builder.emit_te(pick, t.tensor(args["self"]), *indices)


def _read(table: te.Tensor, at: Sequence[Any]) -> Any:
    """An element of a tensor that broadcasts to the axes ``at``."""
    own = at[len(at) - len(table.shape) :]
    return table(*(0 if _is_one(size) else place for size, place in zip(table.shape, own)))


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1


def _slice_scatter(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """``x`` with ``src`` in the place of ``x[start:end:step]``."""
    value = args["self"].meta["val"]
    dim, step = args["dim"] % value.dim(), args["step"]
    size = t.size(value.shape[dim])
    start = bound(t, args["start"], size, 0)

    def put(data: te.Tensor, src: te.Tensor, begin: Any) -> te.Tensor:
        def element(*i: Any) -> Any:
            offset = i[dim] - begin
            place = tirx.floordiv(offset, step)
            inside = tirx.all(offset >= 0, tirx.floormod(offset, step) == 0, place < src.shape[dim])
            at = [place if axis == dim else index for axis, index in enumerate(i)]
            return tirx.if_then_else(inside, src(*at), data(*i))

        return te.compute(data.shape, element, name="slice_scatter")

    return t.emitter.builder.emit_te(put, t.tensor(args["self"]), t.tensor(args["src"], value.dtype), prim(start))


def _select_scatter(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value = args["self"].meta["val"]
    dim = args["dim"] % value.dim()
    index = t.size(args["index"])
    if isinstance(index, int) and index < 0:
        index = t.symbols.simplify(t.size(value.shape[dim]) + index)

    def put(data: te.Tensor, src: te.Tensor, place: Any) -> te.Tensor:
        def element(*i: Any) -> Any:
            return tirx.if_then_else(i[dim] == place, src(*i[:dim], *i[dim + 1 :]), data(*i))

        return te.compute(data.shape, element, name="select_scatter")

    return t.emitter.builder.emit_te(put, t.tensor(args["self"]), t.tensor(args["src"], value.dtype), prim(index))


TABLE: dict[Any, Convert] = {
    _aten.embedding.default: _embedding,
    _aten.index_select.default: _index_select,
    _aten.gather.default: _gather,
    _aten.index.Tensor: _index,
    _aten.slice_scatter.default: _slice_scatter,
    _aten.select_scatter.default: _select_scatter,
}
