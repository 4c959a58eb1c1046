"""Which submodule a block can be replaced through: module paths from the metadata of torch.export."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from moeify.ir.where import common_path, module_path
from moeify.match.linear import Linear
from moeify.match.ops import DROPOUT, RESHAPES, SAME, arguments, data_inputs, hints, is_data, name_of
from moeify.match.region import Region, combined

_SUFFIX = re.compile(r"@\d+")
_KEPT_SHAPE = RESHAPES | SAME


@dataclass(frozen=True)
class Place:
    """The deepest module that holds a call, the submodule that is exactly this call, and its trailing dropout."""

    path: str
    owner: str | None
    output_dropout: float
    linears: tuple[str, ...]


class Modules:
    """The nodes of every call of every module."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                for key in node.meta.get("nn_module_stack") or {}:
                    self.nodes.setdefault(key, []).append(node)

    def place(self, region: Region) -> Place:
        layers = (*region.ups, region.down)
        block = {n for layer in layers for n in (layer.node, layer.core)} | set(region.nodes)
        path = common_path([module_path(layer.core) for layer in layers])
        key = _common_key(layer.core for layer in layers)
        paths = tuple(p for layer in layers if (p := self.layer_path(layer)))
        found = self._owned(key, region, block) if key else None
        if found is None:
            return Place(path, None, 0.0, paths)
        return Place(path, path, found, paths)

    def layer_path(self, layer: Linear) -> str | None:
        """The module that is exactly this linear layer."""
        if layer.weight is None:
            return None
        path, stack = module_path(layer.core), layer.core.meta.get("nn_module_stack") or {}
        if not stack or layer.weight.parameter.rpartition(".")[0] != path:
            return None
        if len(self.nodes[next(reversed(stack))]) > 16:
            return None
        others = set(self.nodes[next(reversed(stack))]) - {layer.core, layer.node}
        return path if all(name_of(n) in _KEPT_SHAPE | {"t"} or not is_data(n) for n in others) else None

    def _owned(self, key: str, region: Region, block: set[fx.Node]) -> float | None:
        """The rate of trailing dropout when the call of ``key`` does what the block does and nothing else."""
        if len(self.nodes[key]) > 4 * len(block) + 40:  # it does much else; not looked at, to stay linear
            return None
        inside = set(self.nodes[key])
        if not block <= inside:
            return None
        rate, read, results = 0.0, set(), set()
        after = {region.down.node}
        for node in self.nodes[key]:
            if not is_data(node):
                continue
            if node not in block:
                name = name_of(node)
                follows = any(before in after for before in data_inputs(node))
                if follows:
                    after.add(node)
                if follows and name in DROPOUT:
                    rate = combined(rate, float(arguments(node)[1]))
                elif not _from_parameters(node) and name not in _KEPT_SHAPE:
                    return None
            read |= {n for n in data_inputs(node) if n not in inside and n.op != "get_attr"}
            if any(user not in inside and (user.op == "output" or is_data(user)) for user in node.users):
                results.add(node)
        if len(read) != 1 or len(results) != 1:
            return None
        (source,), (result,) = read, results
        axis = region.ups[0].x_axis if len(hints(source)) == len(hints(region.ups[0].x)) else -1
        expected = list(hints(source))
        expected[axis] = region.down.d_out
        if hints(source)[axis] != region.ups[0].d_in or list(hints(result)) != expected:
            return None
        return rate


def _from_parameters(node: fx.Node) -> bool:
    return all(n.op == "get_attr" for n in data_inputs(node))


def _common_key(nodes: Iterable[fx.Node]) -> str | None:
    """The innermost module call that all nodes were traced in; None for the root."""
    stacks: list[Mapping[str, tuple]] = [node.meta.get("nn_module_stack") or {} for node in nodes]
    common = None
    for level in zip(*(list(stack) for stack in stacks)):
        if len(set(level)) > 1:
            break
        common = level[0]
    if common is None or not _SUFFIX.sub("", stacks[0][common][0]):
        return None
    return common
