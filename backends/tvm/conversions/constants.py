"""What a graph computes from its parameters alone: computed once, here, and passed as a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_SMALL = 65536  # elements of a constant that may be larger than what it is made of: masks, positions, rotary phases


class Constants:
    """The values that are fixed when a program is compiled, by name.

    A get_attr node has the name of its parameter, and one tensor has one name, the first, however many parameters
    share it. A node that reads constants alone (a transposed weight, ``1 + weight`` of a norm, a table of rotary
    phases) is a constant of its own, unless it is larger than what it reads: those are left in the graph.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._nodes: dict[str, fx.Node] = {}
        self._names: dict[fx.Node, str] = {}
        self._attributes: dict[Any, str] = {}
        self._derived: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self._names[node] = self._attribute(str(node.target))
            elif node.op == "call_function" and self._folds(node):
                self._names[node] = f"constant.{node.name}"
                self._nodes[self._names[node]] = node

    def name(self, node: Any) -> str | None:
        """The name of a constant node, None for what depends on the inputs."""
        return self._names.get(node) if isinstance(node, fx.Node) else None

    def derive(self, node: fx.Node, suffix: str, make: Callable[[torch.Tensor], torch.Tensor]) -> str:
        """The name of what ``make`` computes of a constant. ``suffix`` tells what that is."""
        source = self._names[node]
        name = f"{source}.{suffix}"
        self._derived[name] = (source, make)
        return name

    def tensor(self, name: str) -> torch.Tensor:
        """A value by name."""
        if name in self._derived:
            source, make = self._derived[name]
            return make(self.tensor(source))
        if name in self._nodes:
            return self._compute(self._nodes[name])
        owner, _, leaf = name.rpartition(".")
        return getattr(self._module.get_submodule(owner), leaf).detach()

    def _attribute(self, name: str) -> str:
        tensor = self.tensor(name)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        return self._attributes.setdefault(key, name)

    def _folds(self, node: fx.Node) -> bool:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or node.is_impure() or target.namespace != "aten":
            return False
        if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
            return False
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not _fixed(value):
            return False
        sources = node.all_input_nodes
        if any(source not in self._names for source in sources):
            return False
        # An expanded view holds what it was expanded from, and is cheap to expand again.
        return value.numel() <= max([_SMALL, *(source.meta["val"].numel() for source in sources)])

    def _compute(self, node: fx.Node) -> torch.Tensor:
        def load(source: fx.Node) -> torch.Tensor:
            return self.tensor(self._names[source])

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), load)
        with torch.no_grad():
            result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result


def _fixed(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)
