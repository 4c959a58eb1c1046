"""A program's graph as text: one line per node, parameters and sizes folded into their readers.

    # find-ffn
    # src=float32[batch, seq, 16]
    %src : f32[batch, seq, 16] = input
    layers.0
      %linear : f32[batch, seq, 32] = aten.linear(%layer_norm, @.linear1.weight, @.linear1.bias)
    return %layer_norm_3

``%x`` is a node, ``@a.b.weight`` a parameter; a name that starts with ``@.`` continues the module path
heading its lines. Sizes are written as expressions over the names of the dynamic dimensions. The text
depends on the program alone, so it can be a golden file.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from moeify.ir.layers import is_size, layers
from moeify.ir.metadata import tag
from moeify.ir.program import InputSpec, Program

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_CONSTANT = re.compile(r"_?(?:lifted_)?(?:tensor|constant|_tensor_constant)\w*\d+")


def program_text(program: Program, title: str = "") -> str:
    """The whole graph, every node; ``title`` names the pass that made it."""
    printer = Printer(program.graph_module, program.inputs)
    lines = [f"# {title}"] if title else []
    lines += [f"# {spec}" for spec in program.inputs]
    lines += [printer.line(node) for node in program.graph.nodes if node.op == "placeholder"]
    for layer in layers(program.graph, [block.path for block in program.blocks]):
        if layer.path:
            lines.append(layer.path)
        indent = "  " if layer.path else ""
        lines += [indent + printer.line(node, layer.path) for node in layer.nodes]
    lines += [printer.line(node) for node in program.graph.nodes if node.op == "output"]
    return "\n".join(lines) + "\n"


def op_name(node: fx.Node) -> str:
    """``aten.linear``, ``moe.dispatch_ffn``; overloads are kept (``aten.add.Tensor``)."""
    if node.op in ("placeholder", "output"):
        return node.op.replace("placeholder", "input")
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removesuffix(".default")
        return "moe." + name.removeprefix("moeify.") if name.startswith("moeify.") else name
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


class Printer:
    """Writes the nodes of one graph."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[InputSpec] = (),
    ) -> None:
        self._module = graph_module
        self._name: Callable[[fx.Node], str] = lambda node: node.name
        self._canonical = False
        self._dims = _dimension_names(graph_module.graph, inputs)

    def renamed(self, name: Callable[[fx.Node], str], *, canonical: bool = False) -> Printer:
        """A printer with other names for nodes.

        Lines of a ``canonical`` one are equal only when the nodes compute the same: parameters show their
        shape, scalar constants their value, and which call of a shared block it is stays out.
        """
        twin = copy.copy(self)
        twin._name, twin._canonical = name, canonical
        return twin

    def line(self, node: fx.Node, base: str = "") -> str:
        """One node; parameters below the module path ``base`` are written relative to it."""
        if node.op == "output":
            return f"return {self._value(node.args[0], base)}"
        if node.op == "placeholder":
            right = "input"
        elif node.target is operator.getitem:
            right = f"{self._value(node.args[0], base)}[{self._value(node.args[1], base)}]"
        else:
            right = f"{op_name(node)}({', '.join(self._arguments(node, base))})"
        kind = self.type(node.meta.get("val"))
        return f"%{self._name(node)}{f' : {kind}' if kind else ''} = {right}{self._comment(node, base)}"

    def type(self, value: Any) -> str:
        """``f32[batch, seq, 384]``; '' when there is no value."""
        if isinstance(value, torch.Tensor):
            dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
            return f"{dtype}[{', '.join(self.size(size) for size in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.type(item) or '?' for item in value)})"
        return "" if value is None else type(value).__name__.removeprefix("Sym").lower()

    def size(self, size: int | torch.SymInt) -> str:
        """A size as a number or an expression over named dimensions."""
        if isinstance(size, int):
            return str(size)
        return str(size.node.expr.xreplace(self._dims)).replace(" ", "")

    def parameter(self, name: str, base: str = "") -> str:
        """``@name``, relative to ``base`` when it lies below it."""
        short = name.removeprefix(base) if base and name.startswith(f"{base}.") else name
        if not self._canonical:
            return f"@{short}"
        value = _attribute(self._module, name)
        if _CONSTANT.fullmatch(name) and isinstance(value, torch.Tensor) and value.numel() == 1:
            return f"@={value.item()}"
        return f"@{short}:{self.type(value)}"

    def _arguments(self, node: fx.Node, base: str) -> list[str]:
        named = [f"{key}={self._value(value, base)}" for key, value in node.kwargs.items()]
        return [self._value(value, base) for value in node.args] + named

    def _value(self, value: Any, base: str) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self.parameter(str(value.target), base)
            return self.size(value.meta["val"]) if is_size(value) else f"%{self._name(value)}"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self._value(item, base)}' for key, item in value.items())}}}"
        if isinstance(value, (tuple, list)):
            inside = ", ".join(self._value(item, base) for item in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if isinstance(value, slice):
            parts = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
            return ":".join("" if part is None else self._value(part, base) for part in parts)
        if isinstance(value, torch.dtype):
            return _DTYPES.get(value, str(value))
        if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
            return str(value)
        return repr(value)

    def _comment(self, node: fx.Node, base: str) -> str:
        mark = tag(node)
        if mark is None:
            return ""
        block = "" if mark.block == base else _relative(mark.block, base) + " "
        call = f" of call {mark.call}" if mark.call and not self._canonical else ""
        return f"  # {block}{mark.role}{call}"


def _relative(path: str, base: str) -> str:
    return path.removeprefix(base) if base and path.startswith(f"{base}.") else path


def _attribute(module: torch.nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _dimension_names(graph: fx.Graph, inputs: Sequence[InputSpec]) -> dict[Any, Any]:
    """The capture's symbols to symbols named like the inputs' dimensions; others become n0, n1, ..."""
    names: dict[Any, str] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, inputs):
        value = node.meta.get("val")
        for size, name in zip(getattr(value, "shape", ()), spec.shape):
            if isinstance(size, torch.SymInt) and isinstance(name, str) and size.node.expr.is_Symbol:
                names.setdefault(size.node.expr, name)
    unnamed = 0
    for node in graph.nodes:
        for size in _sizes(node.meta.get("val")):
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                if symbol not in names:
                    names[symbol] = f"n{unnamed}"
                    unnamed += 1
    # Only a model with dynamic sizes pays for sympy's import.
    return {symbol: type(symbol)(name, integer=True, positive=True) for symbol, name in names.items()}


def _sizes(value: Any) -> list[torch.SymInt]:
    if isinstance(value, torch.Tensor):
        return [s for s in tuple[Any, ...](value.shape) if isinstance(s, torch.SymInt)]
    if isinstance(value, torch.SymInt):
        return [value]
    if isinstance(value, (tuple, list)):
        return [size for item in value for size in _sizes(item)]
    return []
