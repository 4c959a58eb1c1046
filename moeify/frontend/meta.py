"""Models on the meta device: shapes without weights, for checkpoints larger than memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn


def is_meta(module: nn.Module) -> bool:
    """Whether some parameter has no values."""
    return any(p.is_meta for p in module.parameters())


def meta_to_cpu(graph_module: fx.GraphModule) -> None:
    """Constants and casts of the graph that name the meta device name the CPU instead, where it will run."""

    def on_cpu(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value

    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, on_cpu)
            node.kwargs = fx.node.map_aggregate(node.kwargs, on_cpu)
    graph_module.recompile()
