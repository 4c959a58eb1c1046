"""Operators without a conversion, as torch itself writes them in simpler ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_DEPTH = 8


def decompose(module: fx.GraphModule, known: Mapping[Any, Any]) -> None:
    """Replace each operator that is not ``known`` by what torch computes it from, where that is all known.

    In place; the graph is to be read and not to be run then.

    Only such operators: a decomposition of the whole graph would take linear layers, attention and norms apart. An
    operator whose decomposition needs one that is unknown stays, to be reported by its own name.
    """
    graph = module.graph
    for node in list(graph.nodes):
        tensors = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
        if node.op == "call_function" and tensors and _unknown(node.target, known):
            recorded = _Recorder(known).run(node)
            if recorded is not None:
                _replace(graph, node, recorded)


def _unknown(target: Any, known: Mapping[Any, Any]) -> bool:
    return (
        isinstance(target, torch._ops.OpOverload)
        and target not in known
        and (
            target.namespace == "aten"
            or target == torch.ops.moeify.ffn.default  # the dense twins of benchmarks have it
        )
    )


class _Recorder(TorchDispatchMode):
    """Runs an operator on fake tensors and writes down the known operators that it comes down to."""

    def __init__(self, known: Mapping[Any, Any]) -> None:
        super().__init__()
        self._known = known
        self._depth = 0
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.result: Any = None

    def run(self, node: fx.Node) -> _Recorder | None:
        """None where the operator has no decomposition into known ones."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not fakes or any(not hasattr(leaf, "fake_mode") for leaf in fakes):
            return None
        mode: Any = fakes[0].fake_mode  # type: ignore[attr-defined]
        try:
            with mode, self, torch.no_grad():
                self.result = self._open(node.target, args, kwargs)
        except _NoDecomposition:
            return None
        made = {id(x) for x in fakes} | {id(x) for *_, result in self.calls for x in pytree.tree_leaves(result)}
        read = pytree.tree_leaves([call[1:3] for call in self.calls] + [self.result])
        # A decomposition may hold a tensor of its own, which no node computes.
        return self if all(id(x) in made for x in read if isinstance(x, torch.Tensor)) else None

    def _open(self, op: Any, args: tuple, kwargs: dict) -> Any:
        made: Callable[..., Any] | None = decomposition_table.get(op)
        if made is not None:
            return made(*args, **kwargs)
        result = op.decompose(*args, **kwargs)
        if result is NotImplemented:
            raise _NoDecomposition
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim" or not any(isinstance(r.type, torch.TensorType) for r in func._schema.returns):
            return func(*args, **kwargs)  # a size, an assertion
        if func not in self._known or func._schema.is_mutable:
            self._depth += 1
            if self._depth > _DEPTH:
                raise _NoDecomposition
            with self:
                result = self._open(func, args, kwargs)
            self._depth -= 1
            return result
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


class _NoDecomposition(Exception):
    pass


def _replace(graph: fx.Graph, node: fx.Node, recorded: _Recorder) -> None:
    """Put the recorded calls before the node, and let its readers read their result."""
    nodes = {id(source.meta["val"]): source for source in node.all_input_nodes}
    with graph.inserting_before(node):
        for func, args, kwargs, result in recorded.calls:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: nodes[id(x)], (args, kwargs))
            args, kwargs = pytree.tree_map_only(torch.SymInt, lambda s: _size(graph, s), (args, kwargs))
            made = graph.call_function(func, args, kwargs)
            made.meta = {**node.meta, "val": result}
            _register(graph, nodes, made, result)
    results = pytree.tree_map_only(torch.Tensor, lambda x: nodes[id(x)], recorded.result)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)


def _size(graph: fx.Graph, value: torch.SymInt) -> fx.Node:
    """A node for a size: an fx graph does not take it as it is."""
    made = graph.call_function(_the_size)
    made.meta["val"] = value
    return made


def _the_size() -> int:
    raise AssertionError("sizes are read from the metadata of their nodes")


def _register(graph: fx.Graph, nodes: dict[int, fx.Node], made: fx.Node, result: Any) -> None:
    if isinstance(result, torch.Tensor):
        nodes[id(result)] = made
        return
    for place, part in enumerate(result):
        got = graph.call_function(operator.getitem, (made, place))
        got.meta = {**made.meta, "val": part}
        nodes[id(part)] = got
