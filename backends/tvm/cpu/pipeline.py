"""From Relax to an executable for the CPU.

Relax operators become kernels, pointwise ones are fused, each kernel gets a schedule, memory is planned, and LLVM
compiles them all as one library.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from moeify.backends.tvm.cpu import legalize, lowering, schedules, transposes
from moeify.backends.tvm.machine import Machine


def compile(mod: tvm.IRModule, machine: Machine) -> relax.VMExecutable:
    """The module's Relax functions and kernels, compiled for ``machine``."""
    lowering.register()
    kernels = schedules.schedule(to_kernels(mod, machine))
    with machine.target:
        lowered = without_aliases(tvm.transform.Sequential(_to_bytecode())(kernels))
        return relax.build(lowered, machine.target, relax_pipeline=None, tir_pipeline=lowering.NAME)


def to_kernels(mod: tvm.IRModule, machine: Machine) -> tvm.IRModule:
    """The module with a call of a kernel for each operator, pointwise ones fused."""
    passes = [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        relax.transform.CanonicalizeBindings(),
        transposes.Cancel(),
        # What lowerings read past (a transpose, a sum) is often read by no one else.
        relax.transform.DeadCodeElimination(),
        relax.transform.LegalizeOps(legalize.table()),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    with machine.target:
        return tvm.transform.Sequential(passes)(_loops(mod))


def _to_bytecode() -> list[Any]:
    return [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]


def _loops(mod: tvm.IRModule) -> tvm.IRModule:
    """Mark the kernels that are loops already."""
    for variable, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc) and function.attrs.get("tirx.is_scheduled", False):
            mod[variable] = function.with_attr(lowering.LOOPS, True)
    return mod


def without_aliases(mod: tvm.IRModule) -> tvm.IRModule:
    """Tell LLVM of every kernel that its buffers do not overlap.

    That holds: the memory plan gives no two live tensors the same bytes, and reads of one input passed twice are
    harmless. TVM's own kernels lack the mark here and there, and one that lacks it takes it from the whole module:
    the sums of matrix kernels would then live in memory, three times slower.
    """
    for variable, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc):
            mod[variable] = function.with_attr("tirx.noalias", True)
    return mod
