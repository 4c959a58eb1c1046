"""A captured graph on another device: its tensors, and the devices that capture wrote into its nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

STAYS = "moeify_stays"  # in the meta of a node whose device is meant, wherever the model is


def move(module: fx.GraphModule, device: torch.device) -> None:
    """In place. What the graph itself makes, such as positions by ``arange``, is made on the device too."""
    module.to(device)
    place(module, device)


def follow(module: fx.GraphModule) -> None:
    """``place`` on the device of the module's own tensors, unless they are on several or have no memory."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) == 1 and (device := devices.pop()).type != "meta":
        place(module, device)


def place(module: fx.GraphModule, device: torch.device) -> None:
    """Let the nodes make their tensors on ``device``."""
    changed = False

    def placed(value: Any) -> Any:
        nonlocal changed
        if not isinstance(value, torch.device) or value == device:
            return value
        changed = True
        return device

    for node in module.graph.nodes:
        if STAYS not in node.meta:
            node.args = fx.node.map_aggregate(node.args, placed)
            node.kwargs = fx.node.map_aggregate(node.kwargs, placed)
    if changed:
        module.recompile()
