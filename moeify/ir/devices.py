"""A captured graph on another device: its tensors, and the devices that capture wrote into its nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def move(module: fx.GraphModule, device: torch.device) -> None:
    """In place. What the graph itself makes, such as positions by ``arange``, is made on the device too."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in module.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    module.recompile()
    module.to(device)
