"""Everything that the CPU lowers itself."""

from __future__ import annotations

import torch

from moeify.backends.tvm.cpu import experts
from moeify.backends.tvm.cpu.dense import DENSE
from moeify.backends.tvm.families import Families


def table(expert_dtype: torch.dtype = torch.float32) -> Families:
    """The table of families; matrices of experts are stored as ``expert_dtype``.

    Raises BadOption for a type other than float32, float16 and bfloat16.
    """
    return Families({**DENSE, **experts.table(expert_dtype)})
