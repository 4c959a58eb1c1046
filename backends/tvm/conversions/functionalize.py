"""Operators that overwrite their argument, as operators that give a new tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_SCATTERS: dict[Any, Any] = {
    _aten.select.int: _aten.select_scatter.default,
    _aten.slice.Tensor: _aten.slice_scatter.default,
}
# They may give their argument itself, though their schema does not say so.
_MAYBE_VIEWS = (
    _aten.contiguous.default,
    _aten.dropout.default,
    _aten.flatten.using_ints,
    _aten.reshape.default,
    _aten.to.device,
    _aten.to.dtype,
    _aten.type_as.default,
)


def functionalize(module: fx.GraphModule) -> None:
    """Rewrite in place. What cannot be rewritten stays, and is refused as an operator without a conversion.

    Before:  a = select(x, 1, 0); copy_(a, y); ... x ...
    After:   b = select_scatter(x, y, 1, 0); ... b ...
    """
    for node in list(module.graph.nodes):
        operator = node.target
        mutates = isinstance(operator, torch._ops.OpOverload) and operator._schema.is_mutable
        if mutates and node.args and isinstance(node.args[0], fx.Node):
            _rewrite(module.graph, node)


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    place = {one: i for i, one in enumerate(graph.nodes)}
    target = node.args[0]
    assert isinstance(target, fx.Node)
    chain = [target]  # the tensor that is written, and what it is a view of
    while _is_view(chain[-1]):
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    pure = _pure(node)
    if pure is None or chain[-1].op != "call_function":
        return  # an input or a parameter is overwritten
    others = [view for view in _views(chain[-1], place) if view not in chain and place[view] < place[node]]
    if any(place[user] > place[node] for view in others for user in view.users):
        return  # another view of it is read later, and would have to change as well
    below = [view for view in chain[1:] if any(place[user] > place[node] for user in view.users)]
    if below and any(view.target not in _SCATTERS for view in chain[: chain.index(below[-1])]):
        return
    with graph.inserting_before(node):
        value = graph.call_function(pure, node.args, node.kwargs) if pure is not _COPY else node.args[1]
        assert isinstance(value, fx.Node)
        value.meta.setdefault("val", target.meta["val"])
        fresh = [value]
        for view, base in zip(chain, chain[1 : chain.index(below[-1]) + 1] if below else []):
            scattered = graph.call_function(_SCATTERS[view.target], (base, fresh[-1], *view.args[1:]), view.kwargs)
            scattered.meta = {**node.meta, "val": base.meta["val"]}
            fresh.append(scattered)
    node.replace_all_uses_with(value)
    for old, new in zip(chain, fresh):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: place.get(user, -1) > place[node])
    graph.erase_node(node)


_COPY = object()


def _pure(node: fx.Node) -> Any:
    """The operator that gives what ``node`` writes; ``_COPY`` where it writes its second argument as it is."""
    target: Any = node.target
    if target == _aten.copy_.default:
        here, source = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]
        return _COPY if here.shape == source.shape and here.dtype == source.dtype else None
    packet = getattr(_aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    aliases = len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return aliases or node.target in _MAYBE_VIEWS


def _views(base: fx.Node, place: dict[fx.Node, int]) -> list[fx.Node]:
    """All that may share the memory of ``base``, by the nodes that are in the graph."""
    found, queue = [base], [base]
    while queue:
        for user in queue.pop().users:
            if user in place and _is_view(user) and user.args[0] in found and user not in found:
                found.append(user)
                queue.append(user)
    return found
