"""A rewritten program run over shapes alone, its dynamic sizes as symbols, as the check of its shapes. Nothing is
computed and no weight read.

It is the run from which torch.export records a graph, without the recording, which takes three quarters of the time.
"""

from __future__ import annotations

import copy

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moeify.errors import Refused
from moeify.ir.program import InputSpec, Program


def check_shapes(program: Program) -> None:
    """Raises Refused when a size does not fit, or when a part reads one that only the data tell, such as how many rows
    an expert gets, or takes it for another."""
    device = next((example.device for example in program.example), torch.device("cpu"))
    sizes = ShapeEnv()
    mode = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True)
    module = _faked(program.graph_module, mode, device)
    inputs = [_symbolic(mode, spec, value) for spec, value in zip(program.inputs, program.example)]
    try:
        with mode, torch.no_grad():
            fx.Interpreter(module).run(*inputs)
    except Exception as error:
        raise _refused(f"{type(error).__name__}: {_first_line(error)}") from error
    # torch puts off to run time what it cannot decide, and there it would fail.
    later = [check.expr for checks in sizes.deferred_runtime_asserts.values() for check in checks]
    for expression in later:
        if isinstance(expression, sympy.Equality):
            raise _refused(f"a size that the data tell would have to be another: {expression}")


def _refused(what: str) -> Refused:
    return Refused(
        f"the shapes of the rewritten program do not fit: {what}",
        hint="a part of the model reads the number of rows inside a block: choose mode=capacity, or report it",
    )


def _symbolic(mode: FakeTensorMode, spec: InputSpec, value: Tensor) -> Tensor:
    sizes = [DimDynamic.DYNAMIC if isinstance(size, str) else DimDynamic.STATIC for size in spec.shape]
    context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(value, symbolic_context=context)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _faked(module: fx.GraphModule, mode: FakeTensorMode, device: torch.device) -> fx.GraphModule:
    """The same graph over parameters and buffers without values."""
    memo: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) in memo:
            continue
        with mode:
            place = device if tensor.is_meta else tensor.device
            empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=place)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)
