"""The extracted activation of a custom block as plain data, so that a checkpoint can hold it without holding code.

Only ATen and ``moeify`` operators can be named; reading one back looks an operator up and runs nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from moeify.errors import Refused, UnreadableFile
from moeify.surgery.region import has_tensor, reads, tensor_at

NAMESPACES = ("aten", "moeify")
_MOST_VALUES = 4096  # of a constant
_TYPED = {torch.dtype: "dtype", torch.device: "device", torch.memory_format: "memory_format", torch.layout: "layout"}


def to_data(region: fx.GraphModule, model: nn.Module, anchor: str) -> dict[str, Any]:
    """The nodes in order, and the small tensors that the model does not have. Raises Refused for what plain data cannot
    hold.
    """
    constants = {name: tensor_at(region, name) for name in reads(region) if not has_tensor(model, name)}
    return {
        "nodes": [_node_to_data(node, anchor) for node in region.graph.nodes],
        "constants": {name: _constant_to_data(value, anchor) for name, value in constants.items()},
    }


def from_data(data: Mapping[str, Any], model: nn.Module) -> fx.GraphModule:
    """A GraphModule; ``model`` gives the tensors that get_attr nodes name. Raises UnreadableFile."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        target = item["target"]
        if item["op"] == "call_function":
            target = _operator(target)
        elif item["op"] not in ("placeholder", "get_attr", "output"):
            raise UnreadableFile(f"the graph of an activation holds a node of kind {item['op']!r}")
        args = _read(item["args"], made)
        kwargs = {key: _read(value, made) for key, value in item["kwargs"].items()}
        made[item["name"]] = graph.create_node(item["op"], target, tuple(args), kwargs, item["name"])
    root = {name: _constant(value) for name, value in data["constants"].items()}
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in root:
            if not has_tensor(model, node.target):
                raise UnreadableFile(f"an activation reads {node.target}, which the model does not have")
            root[node.target] = tensor_at(model, node.target)
    return fx.GraphModule(root, graph)


def _constant_to_data(value: torch.Tensor, anchor: str) -> dict[str, Any]:
    if value.numel() > _MOST_VALUES or value.is_complex():
        raise Refused(f"the activation holds a constant of {value.numel()} values", where=anchor)
    return {"values": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}


def _constant(data: Mapping[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, data["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise UnreadableFile(f"an activation holds a constant of type {data['dtype']!r}")
    return torch.tensor(data["values"], dtype=dtype)


def _node_to_data(node: fx.Node, anchor: str) -> dict[str, Any]:
    target = node.target
    if node.op == "call_function":
        if not isinstance(target, torch._ops.OpOverload) or target.namespace not in NAMESPACES:
            raise Refused(f"the activation calls {target}, which a checkpoint cannot hold", where=anchor)
        target = str(target)
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [_write(value, anchor) for value in node.args],
        "kwargs": {key: _write(value, anchor) for key, value in node.kwargs.items()},
    }


def _write(value: Any, anchor: str) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_write(item, anchor) for item in value]
    if type(value) in _TYPED:
        return {_TYPED[type(value)]: str(value).removeprefix("torch.")}
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise Refused(f"the activation holds a {type(value).__name__}, which a checkpoint cannot hold", where=anchor)


def _read(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, text)] = value.items()
    if kind == "node":
        return made[text]
    if kind == "device":
        return torch.device(text)
    if kind == "float":
        return float(text)
    if kind in _TYPED.values() and isinstance(found := getattr(torch, text, None), tuple(_TYPED)):
        return found
    raise UnreadableFile(f"the graph of an activation holds {value!r}, which cannot be read")


def _operator(name: str) -> torch._ops.OpOverload:
    namespace, packet, overload = (name.split(".") + ["default"])[:3]
    if namespace in NAMESPACES:
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise UnreadableFile(f"the graph of an activation calls {name}, which does not exist here")
