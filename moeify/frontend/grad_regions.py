"""torch.no_grad() regions of a capture, inlined.

torch.export keeps ``with torch.no_grad():`` inside forward (rotary embeddings) as a higher-order operator that calls a
subgraph. Passes, backends and readers are better off with one flat graph, in which the results of the region are
detached instead: the same values and the same gradients.

Before:  a, b = wrap_with_set_grad_enabled(False, submod_1, x, inv_freq)
After:   the nodes of submod_1; a = aten.detach(a'); b = aten.detach(b')
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def inline_grad_regions(graph_module: fx.GraphModule) -> None:
    """Inline every region that turns gradients on or off, the innermost ones too."""
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    changed = True
    while changed:
        changed = False
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function" and node.target is wrap:
                _inline(graph_module, node)
                changed = True
    graph_module.recompile()


def _inline(graph_module: fx.GraphModule, node: fx.Node) -> None:
    enabled, region, *arguments = node.args
    assert isinstance(region, fx.Node)
    body = graph_module.get_submodule(str(region.target))
    assert isinstance(body, fx.GraphModule)
    graph = graph_module.graph
    copies: dict[fx.Node, Any] = {}
    inputs = iter(arguments)
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(inputs)
            elif inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda n: copies[n])
            else:
                copies[inner] = graph.node_copy(inner, lambda n: copies[n])
                if inner.op == "get_attr":  # a region within the region
                    target = f"{region.target}.{inner.target}"
                    copies[inner].target = target
        if not enabled:
            results = fx.map_arg(results, lambda n: _detached(graph, n))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not region.users:
        graph.erase_node(region)
        if not any(str(n.target).startswith(f"{region.target}.") for n in graph.nodes if n.op == "get_attr"):
            graph_module.delete_submodule(str(region.target))


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return node
    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached
