"""The conversion of each operator."""

from __future__ import annotations

from typing import Any

from moeify.backends.tvm.conversions import (
    activations,
    arithmetic,
    attention,
    convolution,
    creation,
    indexing,
    matrices,
    mixture,
    movement,
    norms,
    ordering,
    recurrent,
    reductions,
    routing,
    selection,
    slices,
)
from moeify.backends.tvm.conversions.translation import Convert

_MODULES = (
    activations,
    arithmetic,
    attention,
    convolution,
    creation,
    indexing,
    matrices,
    mixture,
    movement,
    norms,
    ordering,
    recurrent,
    reductions,
    routing,
    selection,
    slices,
)
CONVERSIONS: dict[Any, Convert] = {op: convert for module in _MODULES for op, convert in module.TABLE.items()}
