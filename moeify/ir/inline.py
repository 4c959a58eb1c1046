"""Tracing a small module to ATen, and copying a traced graph into a program's graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify.ir.activations import lookup
from moeify.ir.emit import Emitter

_aten = torch.ops.aten

# Checks that torch.export leaves beside every cast: they pin what the trace saw, which need not be what the
# program has.
_ASSERTS = frozenset({_aten._assert_tensor_metadata.default})


def trace(module: nn.Module, args: tuple[Tensor | None, ...], dynamic: Sequence[int]) -> fx.GraphModule:
    """The ATen graph of a module in eval mode; the first dimension of the arguments in ``dynamic`` may vary,
    alike."""
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if i in dynamic else None for i in range(len(args)))
    program = torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)
    return program.module(check_guards=False)


def inline(
    emit: Emitter,
    source: fx.GraphModule,
    args: Sequence[fx.Node | None],
    rename: Callable[[str], str],
    role: str,
) -> Any:
    """Copy the nodes of ``source`` before the emitter's node and return what its output holds, as nodes.

    ``args`` are bound to the placeholders in order (more than there are placeholders is an error, None for one
    that nobody reads); ``rename`` gives the program's name of each parameter that ``source`` reads.
    """
    left = list(args)
    bound: dict[fx.Node, Any] = {}
    for node in source.graph.nodes:
        if node.op == "placeholder":
            bound[node] = left.pop(0)
        elif node.op == "get_attr":
            bound[node] = emit.parameter(role, rename(node.target))
        elif node.op == "output":
            assert not left, f"{len(left)} arguments too many"
            return fx.map_arg(node.args[0], bound.__getitem__)
        elif node.target not in _ASSERTS:
            values, options = fx.map_arg((node.args, node.kwargs), bound.__getitem__)
            bound[node] = emit.call(role, node.target, *values, **options)
    raise AssertionError("a graph without an output")


def activate(emit: Emitter, activation: str, hidden: fx.Node, role: str) -> fx.Node:
    """A named activation as ATen nodes."""
    result = inline(emit, _traced_activation(activation), [hidden], str, role)
    return result[0] if isinstance(result, (tuple, list)) else result


class _Pointwise(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = lookup(name).function

    def forward(self, u: Tensor) -> Tensor:
        return self.function(u)


@functools.cache
def _traced_activation(name: str) -> fx.GraphModule:
    return trace(_Pointwise(name), (torch.zeros(2, 3),), dynamic=())
