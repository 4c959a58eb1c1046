"""Operators that make tensors of nothing: ranges, constants, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax, te, tirx

from moeify.backends.tvm.conversions.translation import Convert, Translation, prim
from moeify.backends.tvm.types import dtype_name

_aten = torch.ops.aten
_op = relax.op


def _filled(t: Translation, node: fx.Node, value: Any) -> Any:
    dtype = node.meta["val"].dtype
    return t.broadcast(t.tensor(value, dtype), t.shape(node))


def _full(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    return _filled(t, node, args["fill_value"])


def _fill(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    return _filled(t, node, args["value"])


def _ones(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    return _filled(t, node, 1)


def _zeros(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    return _filled(t, node, 0)


def _scalar(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    return t.tensor(args["s"], node.meta["val"].dtype)


def _arange(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    value = node.meta["val"]
    start, step = args.get("start", 0), args.get("step", 1)
    if isinstance(start, float) or isinstance(step, float):
        return _fractions(t, node, start, step)
    first, by = t.size(start), t.size(step)

    def count(begin: Any, stride: Any, length: Any) -> te.Tensor:
        return te.compute([length], lambda i: (begin + i * stride).astype("int64"), name="arange")

    length = t.shape(node)[0]
    numbers = t.emitter.builder.emit_te(count, *(prim(n) for n in (first, by, length)))
    return t.cast(numbers, value.dtype)


def _fractions(t: Translation, node: fx.Node, start: Any, step: Any) -> Any:
    """A range of floats, computed in double precision as torch does."""
    dtype = dtype_name(node.meta["val"].dtype)

    def of(number: Any) -> Any:
        return tirx.const(number, "float64") if isinstance(number, float) else prim(t.size(number))

    first, by = of(start), of(step)

    def count(begin: Any, stride: Any, length: Any) -> te.Tensor:
        def element(i: Any) -> Any:
            return (begin.astype("float64") + i.astype("float64") * stride.astype("float64")).astype(dtype)

        return te.compute([length], element, name="arange")

    # Sizes are arguments of the kernel, fractions are constants in it.
    sizes = [one for one, number in ((first, start), (by, step)) if not isinstance(number, float)]

    def of_sizes(length: Any, *given: Any) -> te.Tensor:
        rest = iter(given)
        begin = first if isinstance(start, float) else next(rest)
        return count(begin, by if isinstance(step, float) else next(rest), length)

    return t.emitter.builder.emit_te(of_sizes, prim(t.shape(node)[0]), *sizes)


def _triangle(lower: bool) -> Convert:
    def convert(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
        diagonal = t.size(args["diagonal"])

        def keep(data: te.Tensor, offset: Any) -> te.Tensor:
            def element(*i: Any) -> Any:
                inside = i[-1] - i[-2] <= offset if lower else i[-1] - i[-2] >= offset
                return tirx.if_then_else(inside, data(*i), tirx.const(0, data.dtype))

            return te.compute(data.shape, element, name="triangle")

        return t.emitter.builder.emit_te(keep, t.tensor(args["self"]), prim(diagonal))

    return convert


def _one_hot(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x = t.tensor(args["self"])
    shape = t.shape(node)
    classes = t.emit(_op.arange(0, shape[-1], 1, "int64"))
    column = t.reshape(x, [*shape[:-1], 1])
    return t.cast(t.emit(_op.equal(column, classes)), node.meta["val"].dtype)


TABLE: dict[Any, Convert] = {
    _aten.full.default: _full,
    _aten.full_like.default: _full,
    _aten.new_full.default: _full,
    _aten.fill.Scalar: _fill,
    _aten.fill.Tensor: _fill,
    **dict.fromkeys((_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default), _ones),
    **dict.fromkeys((_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default), _zeros),
    _aten.scalar_tensor.default: _scalar,
    _aten.arange.default: _arange,
    _aten.arange.start: _arange,
    _aten.arange.start_step: _arange,
    _aten.tril.default: _triangle(lower=True),
    _aten.triu.default: _triangle(lower=False),
    _aten.one_hot.default: _one_hot,
}
