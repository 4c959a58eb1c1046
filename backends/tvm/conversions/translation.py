"""The walk over a graph: what conversions are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tvm import relax, tirx

from moeify.backends.tvm.conversions.constants import Constants
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.families import Families
from moeify.backends.tvm.shapes import Size, Symbols
from moeify.backends.tvm.types import dtype_name, tensor_type

Convert = Callable[["Translation", fx.Node, Mapping[str, Any]], Any]
"""Of the walk, the node and its arguments by name of the operator's schema. Gives the relax expression of the result,
a list of them for an operator with many, or NotImplemented for a case that it does not take."""


class Translation:
    """One graph being translated."""

    def __init__(self, emitter: Emitter, families: Families, symbols: Symbols, constants: Constants) -> None:
        self.emitter = emitter
        self.families = families
        self.symbols = symbols
        self.constants = constants
        self.env: dict[fx.Node, Any] = {}

    def emit(self, expr: Any) -> Any:
        return self.emitter.emit(expr)

    # --- arguments ------------------------------------------------------------------------------------------------

    def name(self, arg: Any) -> str | None:
        """The name of a constant, to ask the weights for; None for what is computed."""
        return self.constants.name(arg)

    def tensor(self, arg: Any, dtype: torch.dtype | str | None = None) -> Any:
        """A node's tensor, or a number (a size of the graph too) as a tensor of no dimensions, as ``dtype``."""
        wanted = dtype if dtype is None or isinstance(dtype, str) else dtype_name(dtype)
        if isinstance(arg, fx.Node) and isinstance(arg.meta["val"], torch.Tensor):
            return self.cast(self._expression(arg), wanted or dtype_name(arg.meta["val"].dtype))
        if isinstance(arg, fx.Node):
            size = self.size(arg)
            if isinstance(size, int):
                return relax.const(size, wanted or "int64")
            # A size becomes a tensor as the only element of a range.
            one = self.emit(relax.op.arange(size, size + 1, 1, "int64"))
            return self.cast(self.emit(relax.op.reshape(one, ())), wanted or "int64")
        return relax.const(arg, wanted or dtype_name(torch.tensor(arg).dtype))

    def _expression(self, node: fx.Node) -> Any:
        if node not in self.env:
            name = self.constants.name(node)
            assert name is not None, f"{node.name} is read before it is computed"
            value = node.meta["val"]
            if value.numel() == 1 and value.dtype != torch.bfloat16:
                tensor = self.constants.tensor(name).reshape(tuple(value.shape))
                self.env[node] = relax.const(tensor.cpu().numpy(), dtype_name(tensor.dtype))
            else:
                self.env[node] = self.emitter.weights.plain(name)
        return self.env[node]

    def size(self, arg: Any) -> Size:
        """An int or a node that computes a size. Sizes are read from torch's own expression of them."""
        return self.symbols.size(arg.meta["val"] if isinstance(arg, fx.Node) else arg)

    def sizes(self, args: Sequence[Any]) -> list[Size]:
        return [self.size(arg) for arg in args]

    def shape(self, node: fx.Node) -> list[Size]:
        """The shape of the result of a node, as torch computed it."""
        return self.sizes(list(node.meta["val"].shape))

    # --- results --------------------------------------------------------------------------------------------------

    def cast(self, expr: Any, dtype: torch.dtype | str) -> Any:
        wanted = dtype if isinstance(dtype, str) else dtype_name(dtype)
        return expr if dtype_of(expr) == wanted else self.emit(relax.op.astype(expr, wanted))

    def reshape(self, expr: Any, shape: Sequence[Size]) -> Any:
        """Only where the shape is not that already."""
        have = shape_of(expr)
        if len(have) == len(shape) and all(self.symbols.equal(a, b) for a, b in zip(have, shape)):
            return expr
        return self.emit(relax.op.reshape(expr, relax.ShapeExpr(_indices(shape))))

    def broadcast(self, expr: Any, shape: Sequence[Size]) -> Any:
        """As ``torch.expand``."""
        have = shape_of(expr)
        if len(have) == len(shape) and all(self.symbols.equal(a, b) for a, b in zip(have, shape)):
            return expr
        return self.emit(relax.op.broadcast_to(expr, relax.ShapeExpr(_indices(shape))))

    def aligned(self, expr: Any, shape: Sequence[Size]) -> Any:
        """The operand of an operator whose result has that shape, where TVM sees that it broadcasts.

        A size that torch knows to be that of the result, and TVM does not, is checked when the program runs.
        """
        have = shape_of(expr)
        wanted = shape[len(shape) - len(have) :]
        sizes = [a if isinstance(a, int) and a == 1 else b for a, b in zip(have, wanted)]
        return self.assume(expr, sizes)

    def assume(self, expr: Any, shape: Sequence[Size]) -> Any:
        """The tensor with a shape that it is known to have; checked at run time where it cannot be proved."""
        have = shape_of(expr) if expr.ty.shape is not None else None
        if have is not None and len(have) == len(shape) and all(self.symbols.equal(a, b) for a, b in zip(have, shape)):
            return expr
        if have is not None:
            assert len(have) == len(shape), f"{have} is not {shape}"
            for a, b in zip(have, shape):
                assert not (isinstance(a, int) and isinstance(b, int) and a != b), f"{have} is not {shape}"
        return self.emitter.builder.match_cast(expr, tensor_type(_indices(shape), dtype_of(expr)))

    def conform(self, result: Any, value: Any) -> Any:
        """The result of a conversion with the shape and type that torch gives it."""
        if isinstance(value, tuple | list):
            parts = result if isinstance(result, tuple | list) else self._parts(result, len(value))
            return [None if part is None else self.conform(part, one) for part, one in zip(parts, value, strict=True)]
        if not isinstance(value, torch.Tensor):
            return result
        return self.assume(self.cast(result, value.dtype), self.sizes(list(value.shape)))

    def unknown(self, value: Any) -> Any:
        """A variable in the place of a result that could not be translated, of the type that torch gives it."""
        if isinstance(value, tuple | list):
            return [self.unknown(one) for one in value]
        if not isinstance(value, torch.Tensor):
            return None
        return relax.Var("unknown", tensor_type(_indices(self.sizes(list(value.shape))), value.dtype))

    def _parts(self, result: Any, count: int) -> list[Any]:
        return [self.emit(relax.TupleGetItem(result, i)) for i in range(count)]


def prim(size: Size) -> Any:
    """A size as an expression of TVM."""
    return tirx.IntImm("int64", size) if isinstance(size, int) else size


def rank_of(args: Mapping[str, Any]) -> int:
    """How many dimensions the operand ``self`` has."""
    rank: int = args["self"].meta["val"].dim()
    return rank


def _indices(shape: Sequence[Size]) -> list[Any]:
    return [prim(size) for size in shape]
