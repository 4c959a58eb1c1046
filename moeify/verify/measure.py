"""Errors of a rewrite, block by block and whole.

The dense program is run once with its blocks' outputs recorded. The rewritten program is then run twice: once
teacher-forced (each block's output is compared with the dense one and replaced by it, so every block sees the dense
model's own inputs and its error is its own), and once free, for the error of the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from moeify.ir import metadata
from moeify.ir.difference import relative_error
from moeify.ir.program import Program, flat

Key = tuple[str, int]
_HALF = (torch.float16, torch.bfloat16)


class _Tapped(fx.Interpreter):
    """Runs a graph and lets ``tap`` see, and replace, the output of every call of every block."""

    def __init__(self, module: fx.GraphModule, tap: Callable[[Key, torch.Tensor], torch.Tensor]) -> None:
        super().__init__(module)
        self.tap = tap

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        mark = metadata.tag(n)
        if mark is not None and mark.role == "output":
            return self.tap((mark.block, mark.call), value)
        return value


class Recording:
    """The dense program's outputs on some inputs: per call of each block, and whole."""

    def __init__(self, program: Program, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs = inputs
        self.blocks: dict[Key, torch.Tensor] = {}

        def keep(key: Key, value: torch.Tensor) -> torch.Tensor:
            self.blocks[key] = value
            return value

        with torch.no_grad(), in_float32(program) as module:
            self.outputs = flat(_Tapped(module, keep).run(*widened(inputs)))

    def block_errors(self, program: Program) -> dict[str, float]:
        """Maximum relative error of each block that is tagged in the rewritten program, by anchor."""
        errors: dict[str, float] = {}

        def compare(key: Key, value: torch.Tensor) -> torch.Tensor:
            dense = self.blocks[key]
            errors[key[0]] = max(errors.get(key[0], 0.0), relative_error(value, dense))
            return dense

        with torch.no_grad(), in_float32(program) as module:
            _Tapped(module, compare).run(*widened(self.inputs))
        return errors

    def model_error(self, program: Program) -> float:
        """Maximum relative error over the outputs of the whole model."""
        with torch.no_grad(), in_float32(program) as module:
            outputs = flat(module(*widened(self.inputs)))
        return outputs_error(outputs, self.outputs)


def outputs_error(outputs: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """The largest relative error over pairs of outputs."""
    if len(outputs) != len(reference):
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(outputs, reference)), default=0.0)


def tolerance_for(program: Program) -> float:
    """The bound for methods that are exact in theory.

    1e-5 for float32 and wider: two orders above the rounding of one sum over F = 4096. Half-precision weights that a
    method scales are rounded once more, to one unit of their last place, whatever the arithmetic; that unit is the
    bound then.
    """
    dtypes = {t.dtype for t in program.graph_module.parameters() if t.is_floating_point()}
    return max([1e-5, *(torch.finfo(d).eps for d in dtypes if d in _HALF)])


@contextmanager
def in_float32(program: Program) -> Iterator[fx.GraphModule]:
    """The program's graph, computing in float32 where its parameters are half precision, so that errors are the
    rewrite's.
    """
    module = program.graph_module
    if not any(t.dtype in _HALF for t in module.parameters()):
        yield module
        return
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(t): _wide_parameter(t) for t in tensors}
    twin = copy.deepcopy(module, memo)
    for node in twin.graph.nodes:
        node.args = torch.utils._pytree.tree_map(_widen_dtype, node.args)
        node.kwargs = torch.utils._pytree.tree_map(_widen_dtype, node.kwargs)
    twin.recompile()
    yield twin


def _wide_parameter(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in _HALF:
        return tensor
    wide = tensor.detach().float()
    return torch.nn.Parameter(wide, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else wide


def _widen_dtype(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value


def widened(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Inputs for what ``in_float32`` gives."""
    return tuple(t.float() if t.dtype in _HALF else t for t in inputs)
