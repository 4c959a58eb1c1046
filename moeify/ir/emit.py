"""Adding nodes to a program's graph: each with its fake value, its tag, and the source line of what it replaces."""

from __future__ import annotations

import operator
from collections.abc import Callable
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
    """Adds nodes before ``before`` for one call of a block; they inherit the origin of ``like``, a node of the
    dense block."""

    program: Program
    before: fx.Node
    block: str
    call_index: int
    like: fx.Node
    example: FakeTensor = field(init=False)  # a result of ``like``: new nodes compute on its device, in its fake mode

    def __post_init__(self) -> None:
        value = self.like.meta["val"]
        self.example = value[0] if isinstance(value, (tuple, list)) else value

    def call(self, role: str, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator, or of operator.getitem."""
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.create_node("call_function", op, args, kwargs, _plain_name(op))
        node.meta["val"] = fake_result(self.program, node, self.example.fake_mode)
        return self._finish(node, role)

    def parameter(self, role: str, name: str) -> fx.Node:
        """A read of a parameter or buffer by its full name."""
        value = self.program.parameter(name)
        with self.program.graph.inserting_before(self.before):
            node = self.program.graph.get_attr(name)
        # A pending parameter is still on the meta device; in the graph it stands where the block computes.
        device = self.example.device
        node.meta["val"] = _remembered(
            self.program,
            self.example.fake_mode,
            ("parameter", value.shape, value.dtype, device),
            lambda: torch.empty(value.shape, dtype=value.dtype, device=device),
        )
        return self._finish(node, role)

    def getitem(self, role: str, node: fx.Node, index: int) -> fx.Node:
        return self.call(role, operator.getitem, node, index)

    def _finish(self, node: fx.Node, role: str) -> fx.Node:
        for key in _INHERITED:
            if key in self.like.meta:
                node.meta[key] = self.like.meta[key]
        node.meta[KEY] = Tag(self.block, self.call_index, role)
        return node


def _plain_name(op: Any) -> str:
    """``linear`` for aten.linear.default, as torch.export names its nodes."""
    return op._schema.name.partition("::")[2] if isinstance(op, torch._ops.OpOverload) else op.__name__


def fake_result(program: Program, node: fx.Node, mode: FakeTensorMode) -> Any:
    """What the node computes, as a fake value, from the fake values of its arguments.

    Layers repeat, and a fake result depends on the arguments' metadata only: one run of an operator serves all layers.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if node.target is operator.getitem:
        return args[0][args[1]]  # type: ignore[index]
    if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()):
        # A number of its own each time: a fake tensor remembers the one it gave, and is itself remembered here.
        # It belongs to this node: a later trace in the same mode must not look for it among its own.
        env = mode.shape_env
        assert env is not None  # a captured program has one
        with mode, env.ignore_fresh_unbacked_symbols():
            args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, args)
            return node.target(*args, **kwargs)  # type: ignore[operator]
    key = node.target, _describe(args), _describe(tuple(kwargs.items()))
    return _remembered(program, mode, key, lambda: node.target(*args, **kwargs))  # type: ignore[operator]


def _remembered(program: Program, mode: FakeTensorMode, key: Any, compute: Callable[[], Any]) -> Any:
    # On the program: a fake value holds its mode, so a table beside the programs would keep every capture alive.
    if key not in program.fakes:
        with mode:
            program.fakes[key] = compute()
    return program.fakes[key]


def _describe(value: Any) -> Any:
    """All of a fake value that a result can depend on, hashable."""
    if isinstance(value, (tuple, list)):
        return tuple(_describe(item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, _describe(value.shape), _describe(value.stride())
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node._expr
    # 1, 1.0 and True are equal and are not the same argument.
    return type(value), value


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
