"""A Relax module compiled for CUDA: schedules, host code, and machine code by nvcc, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.s_tir import dlight

from moeify.backends.tvm.cuda.driver import load_runtime
from moeify.backends.tvm.cuda.nvcc import compile_cuda, find_nvcc
from moeify.backends.tvm.cuda.resources import Kernel, asked_for, over_limits, read_report
from moeify.backends.tvm.cuda.tensor_cores import use_tensor_cores
from moeify.backends.tvm.machine import Machine
from moeify.errors import Refused

_CALLBACK = "tvm_callback_cuda_compile"


@dataclass(frozen=True)
class Built:
    """The executable, the CUDA source of its kernels, and what they use."""

    executable: Any  # relax.VMExecutable
    source: str
    kernels: list[Kernel]


def compile(mod: tvm.IRModule, machine: Machine) -> Any:
    """The executable of a Relax module for ``machine``. Raises RuntimeUnavailable without nvcc, and Refused for a
    kernel that does not fit the GPU."""
    return build(mod, machine).executable


def build(mod: tvm.IRModule, machine: Machine) -> Built:
    """As ``compile``, with what was learnt."""
    find_nvcc()
    load_runtime()
    done: list[tuple[str, str]] = []
    with _nvcc(machine.arch, done), machine.target:
        executable = relax.build(_scheduled(mod), target=machine.target, relax_pipeline=None)
    asked = asked_for(mod)
    kernels = [kernel for source, report in done for kernel in read_report(report, source, asked)]
    wrong = over_limits(kernels, machine.arch)
    if wrong:
        raise Refused(
            f"{len(wrong)} kernels do not fit {machine.arch}: {'; '.join(wrong[:3])}",
            hint="export for another architecture, or report it: moeify chose these sizes",
        )
    return Built(executable, "\n".join(source for source, _ in done), kernels)


def _scheduled(mod: tvm.IRModule) -> tvm.IRModule:
    transform = relax.transform
    passes = [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.RewriteDataflowReshape(),  # before schedules, which hide what is only a reshape
        transform.DeadCodeElimination(),
        _each_function(_no_tensorize),  # before dlight, whose tensorization ends the process (see tensor_cores)
        dlight.ApplyDefaultSchedule(
            dlight.gpu.Matmul(),
            dlight.gpu.GEMV(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        ),
        _each_function(use_tensor_cores),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]
    return tvm.transform.Sequential(passes)(mod)


def _no_tensorize(function: tirx.PrimFunc) -> tirx.PrimFunc:
    return function.with_attr("dlight.do_not_tensorize", True)


def _each_function(change: Any) -> Any:
    """A pass that changes every kernel."""

    @tvm.transform.module_pass(opt_level=0, name=change.__name__)
    def apply(mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        for variable, function in list(mod.functions.items()):
            if isinstance(function, tirx.PrimFunc):
                mod.update_func(variable, change(function))
        return mod

    return apply


@contextmanager
def _nvcc(arch: str, done: list[tuple[str, str]]) -> Iterator[None]:
    """TVM's compilations of CUDA source go through ``compile_cuda``; ``done`` gets each source with its report."""

    def compile_source(code: str) -> bytes:
        compiled = compile_cuda(code, arch)
        done.append((code, compiled.report))
        return compiled.code

    before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)
    tvm_ffi.register_global_func(_CALLBACK, compile_source, override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(_CALLBACK)
        else:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)
