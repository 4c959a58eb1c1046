"""What onnxscript does to a model that torch.onnx has made, without the one rule of it that changes numbers."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
import onnxscript.rewriter
from onnxscript.rewriter import onnx_fusions
from onnxscript.rewriter.rules.common import _no_op


def optimize(model: ir.Model) -> None:
    """Fold constants, rewrite, fuse rotary embeddings and normalisations, in place; as ``optimize=True`` of torch.onnx.

    onnxscript's rules for ``x + 0``, ``x - 0``, ``x * 1`` and ``x / 1`` take 1e-8 for 0 and 1.00001 for 1. They drop
    the epsilon of a normalisation (``rsqrt(mean + 1e-8)``), which moves results by 2e-5 and makes a row of zeros NaN.
    Without them such operations stay where they are true, and the runtime removes them.
    """
    inexact = set(_no_op.rules)
    rules = [rule for rule in onnxscript.rewriter._DEFAULT_REWRITE_RULES if rule not in inexact]
    tidy = (common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass())
    common.InlinePass()(model)
    for _ in range(2):  # what one rule leaves is constant, what is folded fits another
        onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        onnxscript.rewriter.RewritePass(rules)(model)
        for clean in tidy:
            clean(model)
    for one in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    ):
        one(model)
    onnx_fusions.fuse(model)
