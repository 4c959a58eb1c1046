"""A Relax function that a test emits into, and a compiled one as a function of torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import tvm
from torch import Tensor
from tvm import relax, tirx

from moeify.backends.tvm.emitter import Emitter
from moeify.backends.tvm.machine import Machine, machine
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weight, Weights

Run = Callable[..., list[Tensor]]
Input = tuple[Sequence[Any], "torch.dtype | str"]


def module(
    emit: Callable[..., Any],
    inputs: Sequence[Input],
    parameters: Mapping[str, Tensor] | None = None,
    target: Machine | None = None,
) -> tuple[tvm.IRModule, Weights]:
    """``main(*inputs, *weights)`` that gives what ``emit(emitter, *inputs)`` does: one value or a tuple.

    Sizes are numbers, variables, or words for what is known when it runs.
    """
    weights = Weights(dict(parameters or {}).__getitem__)
    words = {size: tirx.Var(size, "int64") for shape, _ in inputs for size in shape if isinstance(size, str)}
    variables = [
        relax.Var(
            f"x{i}", tensor_type([words.get(size, size) if isinstance(size, str) else size for size in shape], dtype)
        )
        for i, (shape, dtype) in enumerate(inputs)
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", attrs={"num_input": len(variables)}):
        with builder.dataflow():
            result = builder.emit_output(emit(Emitter(builder, target or machine(), weights), *variables))
        builder.emit_func_output(result, [*variables, *(weight.var for weight in weights)])
    return builder.get(), weights


def calling(executable: Any, weights: Iterable[Weight]) -> Run:
    """Its ``main``, with those weights. Results are copies: TVM uses their memory again."""
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    values = [_tvm(weight.value()) for weight in weights]

    def run(*inputs: Tensor) -> list[Tensor]:
        result = main(*[_tvm(x.clone(memory_format=torch.contiguous_format)) for x in inputs], *values)
        results = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [torch.from_dlpack(one).clone() for one in results]

    return run


def _tvm(tensor: Tensor) -> tvm.runtime.Tensor:
    return tvm.runtime.from_dlpack(tensor)
