"""A key that is equal for regions which compute the same thing, so that equal layers are probed once."""

from __future__ import annotations

from typing import Any

from torch import fx

from moeify.match.ops import hint, hints, is_data, name_of
from moeify.match.region import Region


def signature(region: Region) -> tuple[Any, ...]:
    """Operators, arguments, wiring and example sizes of a region; parameters count by kind and shape."""
    numbers: dict[fx.Node, int] = {}
    entries: list[Any] = [(up.out_axis, hints(up.node)) for up in region.ups]
    entries.append((region.down.x_axis, hints(region.down.x)))

    def describe(item: fx.Node) -> Any:
        if item in numbers:
            return f"%{numbers[item]}"
        if item.op == "get_attr":
            return f"attribute {hints(item)} {_identity(item)}"
        if is_data(item):
            return f"{name_of(item)}{fx.map_arg(item.args, describe)}{hints(item)}"
        val = item.meta.get("val")
        return f"size {hint(val) if val is not None else item.name}"

    for up in region.ups:
        numbers[up.node] = len(numbers)
    for node in region.nodes:
        args, kwargs = fx.map_arg(node.args, describe), fx.map_arg(dict(node.kwargs), describe)
        numbers[node] = len(numbers)
        entries.append((str(node.target), repr(args), repr(kwargs), hints(node)))
    entries.append(numbers.get(region.down.x))
    return tuple(entries)


def _identity(node: fx.Node) -> str:
    """Parameters are drawn at random by the probe; buffers keep their values and are told apart by name."""
    val = node.meta.get("val")
    return "parameter" if getattr(val, "requires_grad", False) else str(node.target)
