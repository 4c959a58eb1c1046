"""Kernels of the CUDA target run on the CPU: the same functions with their loops over threads made plain ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import tvm

from moeify.backends.tvm.cuda import nvcc
from moeify.backends.tvm.cuda.serial import serial_module
from moeify.backends.tvm.machine import Machine, machine
from moeify.backends.tvm.weights import Weights
from moeify.errors import RuntimeUnavailable
from tests import tvm_functions as functions

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
    return functions.module(emit, list(inputs.values()), parameters, cuda_machine())


def on_cpu(made: tvm.IRModule, weights: Weights) -> Callable[..., Any]:
    """The module as a function of torch tensors, with every kernel of ours serial."""
    every = functions.calling(tvm.compile(serial_module(made), target=machine("cpu").target), weights)

    def run(*inputs: torch.Tensor) -> Any:
        results = every(*inputs)
        return results[0] if len(results) == 1 else results

    return run


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
