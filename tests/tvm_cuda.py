"""Kernels of the CUDA target run on the CPU: the same functions with their loops over threads made plain ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import tvm
from tvm import relax

from moeify.backends.tvm.cuda import nvcc
from moeify.backends.tvm.cuda.serial import serial_module
from moeify.backends.tvm.emitter import Emitter
from moeify.backends.tvm.machine import Machine, machine
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weights
from moeify.errors import RuntimeUnavailable

ARCH = "sm_90"


def _has_nvcc() -> bool:
    try:
        nvcc.find_nvcc()
    except RuntimeUnavailable:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="nvcc, which the CUDA target is compiled with, is not here")


def cuda_machine(arch: str = ARCH) -> Machine:
    return machine("cuda", arch)


def module(
    inputs: Mapping[str, tuple[Sequence[Any], torch.dtype]],
    emit: Callable[..., Any],
    parameters: Mapping[str, torch.Tensor] = {},
) -> tuple[tvm.IRModule, Weights]:
    """A Relax module with ``main(inputs..., weights...)`` as ``emit(emitter, *inputs)`` makes it."""
    builder = relax.BlockBuilder()
    weights = Weights(lambda name: parameters[name])
    variables = [relax.Var(name, tensor_type(shape, dtype)) for name, (shape, dtype) in inputs.items()]
    with builder.function("main", variables):
        with builder.dataflow():
            result = builder.emit_output(emit(Emitter(builder, cuda_machine(), weights), *variables))
        builder.emit_func_output(result)
    made = builder.get()
    main = made["main"]
    arguments = [*variables, *(weight.var for weight in weights)]
    made["main"] = relax.Function(arguments, main.body, main.ret_ty, main.is_pure, main.attrs).with_attr(
        "num_input", len(variables)
    )
    return made, weights


def on_cpu(made: tvm.IRModule, weights: Weights) -> Callable[..., Any]:
    """The module as a function of torch tensors, with every kernel of ours serial."""
    vm = relax.VirtualMachine(tvm.compile(serial_module(made), target=machine("cpu").target), tvm.cpu())
    values = [tvm.runtime.tensor(weight.value().numpy()) for weight in weights]

    def run(*inputs: torch.Tensor) -> Any:
        return _torch(vm["main"](*(tvm.runtime.tensor(value.numpy()) for value in inputs), *values))

    return run


def _torch(value: Any) -> Any:
    return torch.from_numpy(value.numpy()) if hasattr(value, "numpy") else [_torch(one) for one in value]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
