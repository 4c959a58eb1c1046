"""Which float types half precision concerns, and how a graph spells a cast."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

HALF = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)
ASSERT = torch.ops.aten._assert_tensor_metadata.default
_CASTS = ("aten::to", "aten::_to_copy", "prims::convert_element_type")


def changes(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether a tensor of the type ``old`` is a float that the cast to ``new`` changes."""
    return old in (*WIDE, *HALF) and old != new


def float_type(value: object) -> torch.dtype | None:
    """The type of a float tensor, None of everything else."""
    return value.dtype if isinstance(value, torch.Tensor) and value.dtype in (*WIDE, *HALF) else None


def as_infinity(dtype: torch.dtype) -> float:
    """Masks hold ``torch.finfo(dtype).min`` for minus infinity, or a little less of it."""
    return torch.finfo(dtype if dtype in HALF else torch.float32).max * 0.99


def is_cast(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _CASTS


def dtypes(node: fx.Node) -> Iterator[torch.dtype]:
    """Those that the node names in its arguments."""
    return (value for value in [*node.args, *node.kwargs.values()] if isinstance(value, torch.dtype))
