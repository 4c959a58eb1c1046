"""Sizes of torch in TVM: one tirx variable for each size that a caller may choose."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy import functions
from tvm import sym, tirx

from moeify.errors import Refused

Size = Any  # an int, or a tirx expression of int64

_DIVISIONS = (functions.FloorDiv, functions.CleanDiv)
_REMAINDERS = (functions.Mod, functions.PythonMod)


class Symbols:
    """torch's symbols as tirx variables.

    The variables are the names of the dynamic dimensions of the inputs: two inputs whose dimension has one name share
    a variable, even where torch has a symbol for each.
    """

    def __init__(self) -> None:
        self._values: dict[sympy.Symbol, Size] = {}
        self._variables: dict[str, tirx.Var] = {}
        self._analyzer = sym.Analyzer()

    def bind(self, shapes: Sequence[Sequence[Any]], names: Sequence[Sequence[int | str]]) -> list[list[Size]]:
        """The sizes of the inputs, whose torch shapes and names of dimensions are given.

        Symbols that are a size themselves are bound first; then those that are only found inside a size (an input
        that torch requires to be ``2 * s0`` long), which must be linear. Raises Refused.
        """
        pairs = [(self._expression(s), str(name)) for shape, of in zip(shapes, names) for s, name in zip(shape, of)]
        for expression, name in pairs:
            if isinstance(expression, sympy.Symbol) and expression not in self._values:
                self._values[expression] = self._variable(name)
        solved = {}
        for expression, name in pairs:
            free = {s for s in expression.free_symbols if s not in self._values}
            if free:
                solved[expression] = self._solve(expression, free, name)
        return [[solved.get(self._expression(s), self.size(s)) for s in shape] for shape in shapes]

    def size(self, value: Any) -> Size:
        """An int, a torch.SymInt or a sympy expression as an int or a tirx expression. Raises Refused."""
        expression = self._expression(value)
        if expression.is_Integer:
            return int(expression)
        result = self._analyzer.simplify(self._translate(expression))
        return int(result) if isinstance(result, tirx.IntImm) else result

    def equal(self, left: Size, right: Size) -> bool:
        """Whether two sizes are provably one."""
        if isinstance(left, int) and isinstance(right, int):
            return left == right
        return bool(self._analyzer.can_prove_equal(left, right))

    def simplify(self, size: Size) -> Size:
        """A size in its shortest form, an int where it is one."""
        if isinstance(size, int):
            return size
        result = self._analyzer.simplify(size)
        return int(result) if isinstance(result, tirx.IntImm) else result

    def _variable(self, name: str) -> tirx.Var:
        if name not in self._variables:
            self._variables[name] = tirx.Var(re.sub(r"\W", "_", name) or "size", "int64")
        return self._variables[name]

    def _solve(self, expression: sympy.Expr, free: set[sympy.Symbol], name: str) -> tirx.Var:
        """Bind the only symbol of a size that has not been bound; gives the variable of the size."""
        symbol = free.pop()
        slope, rest = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
        linear = sympy.expand(slope * symbol + rest - expression) == 0 and slope.is_Integer and slope > 0
        if free or not linear:
            raise Refused(
                f"the size {name} must be {expression}, from which the TVM backend cannot find the sizes in it",
                hint="capture the model with that dimension fixed",
            )
        variable = self._variable(name)
        self._values[symbol] = tirx.floordiv(variable - self.size(rest), int(slope))
        return variable

    @staticmethod
    def _expression(value: Any) -> sympy.Expr:
        if isinstance(value, torch.SymInt):
            return value.node.expr
        return sympy.sympify(value)

    def _translate(self, expression: sympy.Expr) -> Size:
        if expression.is_Integer:
            return tirx.IntImm("int64", int(expression))
        if isinstance(expression, sympy.Symbol):
            if expression not in self._values:
                raise Refused(f"the size {expression} depends on the values of tensors")
            value = self._values[expression]
            return tirx.IntImm("int64", value) if isinstance(value, int) else value
        operands = [self._translate(arg) for arg in expression.args]
        if isinstance(expression, sympy.Add):
            return _fold(lambda a, b: a + b, operands)
        if isinstance(expression, sympy.Mul) and all(arg.is_Integer or not arg.is_number for arg in expression.args):
            return _fold(lambda a, b: a * b, operands)
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
            return _fold(lambda a, b: a * b, [operands[0]] * int(expression.exp))
        if isinstance(expression, functions.PowByNatural) and expression.args[1].is_Integer:
            return _fold(lambda a, b: a * b, [operands[0]] * int(expression.args[1]))
        if isinstance(expression, functions.Identity):
            return operands[0]
        if isinstance(expression, _DIVISIONS):
            return tirx.floordiv(*operands)
        if isinstance(expression, _REMAINDERS):
            return tirx.floormod(*operands)
        if isinstance(expression, functions.Max | sympy.Max):
            return _fold(tirx.max, operands)
        if isinstance(expression, functions.Min | sympy.Min):
            return _fold(tirx.min, operands)
        raise Refused(f"the size {expression} has no translation to TVM")


def _fold(combine: Callable[[Any, Any], Any], operands: Sequence[Any]) -> Any:
    result = operands[0]
    for operand in operands[1:]:
        result = combine(result, operand)
    return result
