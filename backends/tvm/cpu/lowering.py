"""From scheduled kernels to what LLVM is given: TVM's own passes, without the slow ones where they have no work."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import compilation_pipeline

from moeify.backends.tvm.cpu import flattening

NAME = "moeify_cpu"
LOOPS = "moeify.loops"  # attribute of a kernel that has no block to lower


def register() -> None:
    """Make the pipeline known to TVM by ``NAME``, which is how ``relax.build`` takes one."""
    compilation_pipeline.register_tir_pipeline(NAME, _pipeline)


def _pipeline() -> Any:
    _, finish_host, finish_device = s_tir.pipeline.default_s_tir_pipeline()

    @tvm.transform.module_pass(opt_level=0)
    def lower(mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        ours = _lower(tirx.transform.Filter(_is_ours)(mod), ours=True)
        theirs = _lower(tirx.transform.Filter(lambda f: not _is_ours(f))(mod), ours=False)
        ours.update(theirs)
        return _PACK(ours)

    return lower, finish_host, finish_device


def _is_ours(function: tirx.PrimFunc) -> bool:
    """Written as loops by us: no buffer to shrink, no condition to hoist. Looking for some takes TVM seconds."""
    return bool(function.attrs.get(LOOPS, False))


def _lower(mod: tvm.IRModule, *, ours: bool) -> tvm.IRModule:
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        *([] if ours else [s_tir.transform.CompactBufferAllocation()]),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer() if ours else flattening.flatten(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        *([] if ours else [s_tir.transform.HoistIfThenElse()]),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        *([] if ours else [tirx.transform.RemoveNoOp()]),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
    ]
    return tvm.ir.transform.Sequential(passes)(mod)


_PACK = tvm.ir.transform.Sequential(
    [
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ]
)
