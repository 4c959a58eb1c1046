"""Everything that the CUDA target lowers itself."""

from __future__ import annotations

from moeify.backends.tvm.cuda import choice, experts, permute
from moeify.backends.tvm.cuda.dense import DENSE
from moeify.backends.tvm.families import Families


def table() -> Families:
    """The table of families, for float32 and float16."""
    return Families(
        {
            **DENSE,
            "dispatch_ffn": experts.dispatch_ffn,
            "permute": permute.permute,
            "experts": experts.experts,
            "grouped_linear": experts.grouped_linear,
            "unpermute": permute.unpermute,
            "topk": choice.topk,
            "route": choice.route,
        }
    )
