"""Adding nodes to a program's graph: each with its fake value, its tag, and the source line of what it replaces."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode

from moeify.ir.metadata import KEY, Tag
from moeify.ir.program import Program

_INHERITED = ("nn_module_stack", "stack_trace")


@dataclass
class Emitter:
    """Adds nodes before ``before`` for one call of a block. ``like`` is the node of the dense block whose origin they inherit."""

    program: Program
    before: fx.Node
    block: str
    call_index: int
    like: fx.Node
    added: list[fx.Node] = field(default_factory=list)

    def call(self, role: str, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator, or of operator.getitem."""
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.call_function(op, args, kwargs)
        node.meta["val"] = fake_result(node)
        return self._finish(node, role)

    def parameter(self, role: str, name: str) -> fx.Node:
        """A read of a parameter or buffer by its full name."""
        value = self.program.parameter(name)
        example = self.like.meta["val"]
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.get_attr(name)
        # A pending parameter is still on the meta device; in the graph it stands where the block computes.
        with example.fake_mode:
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=example.device)
        return self._finish(node, role)

    def getitem(self, role: str, node: fx.Node, index: int) -> fx.Node:
        return self.call(role, operator.getitem, node, index)

    def _finish(self, node: fx.Node, role: str) -> fx.Node:
        for key in _INHERITED:
            if key in self.like.meta:
                node.meta[key] = self.like.meta[key]
        node.meta[KEY] = Tag(self.block, self.call_index, role)
        self.added.append(node)
        return node


def fake_result(node: fx.Node) -> Any:
    """What the node computes, as a fake value, from the fake values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = _mode(args, kwargs)
    if mode is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    with mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _mode(args: Any, kwargs: Any) -> FakeTensorMode | None:
    for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by the names of its schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def replace(old: fx.Node, new: fx.Node, role: str = "output") -> None:
    """Let every reader of ``old`` read ``new``, give ``new`` the role, and take ``old`` out of the graph."""
    mark = new.meta[KEY]
    new.meta[KEY] = Tag(mark.block, mark.call, role)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
