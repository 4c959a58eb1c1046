"""What autocast does to ``moe.*``: the operators with matrices run in the autocast dtype, as ``aten.linear`` does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.ir import ops_experts, ops_grouped
from moeify.ir.ops_library import LIBRARY

_DEFINE = (ops_experts, ops_grouped)  # the operators must exist before they get another kernel


def _cast(value: Any, device: str) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.device.type == device:
        return value.to(torch.get_autocast_dtype(device)) if value.dtype != torch.float64 else value
    return value


def _autocast(name: str, device: str) -> None:
    key = f"Autocast{device.upper()}"
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    op = getattr(torch.ops.moeify, name).default

    def run(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*(_cast(arg, device) for arg in args))

    LIBRARY.impl(name, run, key)


for _name in ("grouped_linear", "experts", "dispatch_ffn", "unpermute"):
    for _device in ("cpu", "cuda"):
        _autocast(_name, _device)
