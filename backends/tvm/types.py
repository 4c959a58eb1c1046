"""Tensor types of torch in TVM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``, as TVM spells it."""
    return str(dtype).removeprefix("torch.")


def tensor_type(shape: Sequence[Any], dtype: torch.dtype | str) -> Any:
    """The relax type of a tensor. Sizes are ints or tirx expressions."""
    from tvm import relax

    return relax.TensorType(tuple(shape), dtype if isinstance(dtype, str) else dtype_name(dtype))
