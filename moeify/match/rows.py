"""The part of a block between its linear layers, as a function of rows: ``(u_RF[, g_RF]) -> h_RF``.

The captured nodes carry batch and sequence axes in any order. Each value is brought into the form ``[R, *features]``:
the axes that hold features are followed from the linear layers on, all others become the one row axis. Where a node
would mix the two, or two rows, there is no such function and ``MixesRows`` says which node it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moeify.match.axes import MixesRows, regroup, reordering
from moeify.match.ops import (
    CUTS,
    DROPOUT,
    NORMS,
    REDUCTIONS,
    REORDERS,
    RESHAPES,
    SAME,
    SOFTMAX,
    SPLITS,
    arg,
    arguments,
    data_inputs,
    hint,
    hints,
    is_pointwise,
    name_of,
    shape,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class _Value:
    """A node of the new graph, ``[R, *features]``, and which axes of the captured tensor the features were."""

    node: fx.Node
    dims: tuple[int, ...]
    sizes: tuple[int, ...]  # of the captured tensor, as in the example


def extract(
    nodes: Sequence[fx.Node],
    sources: Sequence[tuple[fx.Node, int]],
    hidden: tuple[fx.Node, int],
    root: nn.Module,
) -> fx.GraphModule:
    """The row function of ``nodes`` (in graph order). ``sources`` and ``hidden`` are nodes with their feature axis."""
    maker = _Maker(root)
    for name, (node, axis) in zip(("u", "g"), sources):
        maker.values[node] = _Value(maker.graph.placeholder(name), (axis,), hints(node))
    for node in nodes:
        maker.add(node)
    return maker.finish(*hidden)


class _Maker:
    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.graph = fx.Graph()
        self.values: dict[fx.Node, _Value] = {}
        self.parts: dict[fx.Node, Callable[[int], _Value]] = {}  # results of chunk, split, unbind
        self.constants: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        name = name_of(node)
        rules: tuple[tuple[Any, Callable[[fx.Node], _Value]], ...] = (
            ({"getitem"}, self._getitem),
            (SAME, self._same),
            (DROPOUT, self._first_only),
            (RESHAPES, self._reshape),
            (REORDERS, self._reorder),
            (CUTS, self._cut),
            (NORMS, self._norm),
            (REDUCTIONS, self._reduce),
            (SOFTMAX | {"glu"}, self._along),
            ({"cat"}, self._cat),
        )
        if name in SPLITS:
            self._split(node)
            return
        for names, rule in rules:
            if name in names:
                self.values[node] = rule(node)
                return
        if not is_pointwise(node):
            raise MixesRows(f"{name} stands between the linear layers and may mix rows")
        self.values[node] = self._pointwise(node)

    def finish(self, hidden: fx.Node, axis: int) -> fx.GraphModule:
        value = self.values[hidden]
        wide = [dim for dim in value.dims if value.sizes[dim] != 1]
        if wide != [axis]:
            raise MixesRows(f"{name_of(hidden)} leaves the features on another axis than the down layer reads")
        node = value.node
        if len(value.dims) != 1:
            node = self._emit(aten.reshape.default, (node, [-1, value.sizes[axis]]))
        self.graph.output(node)
        module = fx.GraphModule(_holder(self.root, self.graph), self.graph)
        module.graph.lint()
        return module

    # --- one rule per family of operators -------------------------------------------------------------------------

    def _emit(self, target: Any, args: tuple, kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        return self.graph.call_function(target, args, dict(kwargs or {}))

    def _value(self, node: Any) -> _Value:
        if not isinstance(node, fx.Node) or node not in self.values:
            raise MixesRows("a constant takes the place of the hidden value")
        return self.values[node]

    def _getitem(self, node: fx.Node) -> _Value:
        source, index = arguments(node)
        if source in self.parts:
            return self.parts[source](int(index))
        raise MixesRows(f"a part of {name_of(source)} is read")

    def _same(self, node: fx.Node) -> _Value:
        return self._value(arguments(node)[0])

    def _first_only(self, node: fx.Node) -> _Value:
        value = self._value(arguments(node)[0])
        out = self._emit(node.target, (value.node, *arguments(node)[1:]), node.kwargs)
        return _Value(out, value.dims, value.sizes)

    def _pointwise(self, node: fx.Node) -> _Value:
        inside = [self.values[n] for n in data_inputs(node) if n in self.values]
        if not inside:
            raise MixesRows(f"{name_of(node)} does not read the hidden value")
        rank, dims = len(inside[0].sizes), inside[0].dims
        if any((len(v.sizes), v.dims) != (rank, dims) for v in inside):
            raise MixesRows(f"{name_of(node)} combines values whose axes differ")
        for other in inside:
            if any(a != b for d, (a, b) in enumerate(zip(other.sizes, hints(node))) if d not in dims):
                raise MixesRows(f"{name_of(node)} broadcasts over rows")
        per_channel = name_of(node) in ("prelu", "_prelu_kernel")

        def convert(a: fx.Node) -> fx.Node:
            if a in self.values:
                return self.values[a].node
            if per_channel:
                return self._channel(a, rank, dims, node)
            return self._constant(a, rank, dims, node)

        args = fx.map_arg(arguments(node), convert)
        kwargs = fx.map_arg(node.kwargs, convert)
        return _Value(self._emit(node.target, args, kwargs), dims, hints(node))

    def _constant(self, a: fx.Node, rank: int, dims: tuple[int, ...], node: fx.Node) -> fx.Node:
        copied, sizes = self._copy(a), hints(a)
        padded = (1,) * (rank - len(sizes)) + sizes
        if any(size != 1 for dim, size in enumerate(padded) if dim not in dims) or len(padded) != rank:
            raise MixesRows(f"{name_of(node)} treats rows differently (a parameter along a row axis)")
        wanted = [padded[dim] for dim in dims]
        if not sizes or list(sizes) == wanted:
            return copied
        return self._emit(aten.reshape.default, (copied, wanted))

    def _channel(self, a: fx.Node, rank: int, dims: tuple[int, ...], node: fx.Node) -> fx.Node:
        """The weight of prelu, which goes along axis 1 whatever the rank."""
        if hints(a) not in ((), (1,)) and dims != (1,):
            raise MixesRows(f"{name_of(node)} treats rows differently (a parameter along a row axis)")
        return self._copy(a)

    def _copy(self, a: fx.Node) -> fx.Node:
        """A parameter, or what is computed from parameters alone."""
        if a not in self.constants:
            if a.op == "get_attr":
                self.constants[a] = self.graph.get_attr(str(a.target))
            elif a.op == "call_function" and all(isinstance(n.meta.get("val"), torch.Tensor) or n.op == "get_attr"
                                                 for n in a.all_input_nodes):  # fmt: skip
                self.constants[a] = self.graph.node_copy(a, self._copy)
            else:
                raise MixesRows(f"the hidden value also depends on {name_of(a) or a.name}")
        return self.constants[a]

    def _reshape(self, node: fx.Node) -> _Value:
        value = self._value(arguments(node)[0])
        out_sizes = hints(node)
        out_dims = regroup(value.sizes, value.dims, out_sizes, name_of(node))
        for dim in out_dims:
            if not isinstance(shape(node)[dim], int):
                raise MixesRows("the feature axis has a dynamic size")
        new, old = [out_sizes[d] for d in out_dims], [value.sizes[d] for d in value.dims]
        out = value.node if new == old else self._emit(aten.reshape.default, (value.node, [-1, *new]))
        return _Value(out, out_dims, out_sizes)

    def _reorder(self, node: fx.Node) -> _Value:
        value = self._value(arguments(node)[0])
        order = reordering(node, len(value.sizes))
        places = {old: new for new, old in enumerate(order)}
        moved = [places[dim] for dim in value.dims]
        out = value.node
        if sorted(moved) != moved:
            ranks = sorted(range(len(moved)), key=moved.__getitem__)
            out = self._emit(aten.permute.default, (out, [0, *(1 + r for r in ranks)]))
        return _Value(out, tuple(sorted(moved)), hints(node))

    def _axis(self, value: _Value, dim: Any, node: fx.Node) -> int:
        """The place of a captured axis in the new form; it must hold features."""
        dim = hint(dim) % len(value.sizes)
        if dim not in value.dims:
            raise MixesRows(f"{name_of(node)} works along a row axis")
        return 1 + value.dims.index(dim)

    def _cut(self, node: fx.Node) -> _Value:
        value = self._value(arguments(node)[0])
        name, dim = name_of(node), arg(node, 1, "dim", 0)
        place = self._axis(value, dim, node)
        if name == "select":
            gone = hint(dim) % len(value.sizes)
            dims = tuple(d - (d > gone) for d in value.dims if d != gone)
            out = self._emit(node.target, (value.node, place, arguments(node)[2]))
            return _Value(out, dims, hints(node))
        out = self._emit(node.target, (value.node, place, *arguments(node)[2:]), node.kwargs)
        return _Value(out, value.dims, hints(node))

    def _split(self, node: fx.Node) -> None:
        value = self._value(arguments(node)[0])
        name = name_of(node)
        dim = arg(node, 1 if name == "unbind" else 2, "dim", 0)
        place = self._axis(value, dim, node)
        head = arguments(node)[:1] if name == "unbind" else arguments(node)[:2]
        made = self._emit(node.target, (value.node, *head[1:], place))
        results = node.meta["val"]

        def part(index: int) -> _Value:
            dims = value.dims
            if name == "unbind":
                gone = hint(dim) % len(value.sizes)
                dims = tuple(d - (d > gone) for d in dims if d != gone)
            item = self.graph.call_function(operator.getitem, (made, index))
            return _Value(item, dims, tuple(hint(s) for s in results[index].shape))

        self.parts[node] = part

    def _norm(self, node: fx.Node) -> _Value:
        value = self._value(arguments(node)[0])
        axes = len(arguments(node)[1])
        last = tuple(range(len(value.sizes) - axes, len(value.sizes)))
        if value.dims[-axes:] != last:
            raise MixesRows(f"{name_of(node)} normalises over a row axis")
        args = fx.map_arg(arguments(node), lambda a: self.values[a].node if a in self.values else self._copy(a))
        return _Value(self._emit(node.target, args, node.kwargs), value.dims, value.sizes)

    def _reduce(self, node: fx.Node) -> _Value:
        value = self._value(arguments(node)[0])
        name = name_of(node)
        place = 2 if name in ("linalg_vector_norm", "norm") else 1
        dims, keep = arg(node, place, "dim"), arg(node, place + 1, "keepdim", False)
        if name in ("var", "std"):
            keep = node.kwargs.get("keepdim", arguments(node)[3] if len(arguments(node)) > 3 else False)
        if dims is None or dims == [] or isinstance(dims, bool):
            raise MixesRows(f"{name} reduces over rows")
        places = [self._axis(value, dim, node) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
        if not keep:
            raise MixesRows(f"{name} drops the feature axis")
        new = places if isinstance(dims, (list, tuple)) else places[0]
        args = list(arguments(node))
        kwargs = dict(node.kwargs)
        args[0] = value.node
        if len(args) > place:
            args[place] = new
        else:
            kwargs["dim"] = new
        return _Value(self._emit(node.target, tuple(args), kwargs), value.dims, hints(node))

    def _along(self, node: fx.Node) -> _Value:
        value = self._value(arguments(node)[0])
        place = self._axis(value, arg(node, 1, "dim", -1), node)
        out = self._emit(
            node.target,
            (value.node, place, *arguments(node)[2:]),
            {k: v for k, v in node.kwargs.items() if k != "dim"},
        )
        return _Value(out, value.dims, hints(node))

    def _cat(self, node: fx.Node) -> _Value:
        values = [self._value(n) for n in arguments(node)[0]]
        if len({(v.dims, len(v.sizes)) for v in values}) != 1:
            raise MixesRows("cat combines values whose axes differ")
        place = self._axis(values[0], arg(node, 1, "dim", 0), node)
        return _Value(self._emit(node.target, ([v.node for v in values], place)), values[0].dims, hints(node))


def _holder(root: nn.Module, graph: fx.Graph) -> nn.Module:
    """A module that holds the parameters a graph reads, the same objects under the same names."""
    holder = nn.Module()
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        *owners, leaf = str(node.target).split(".")
        source, target = root, holder
        for part in owners:
            source = getattr(source, part)
            if not hasattr(target, part):
                target.add_module(part, nn.Module())
            target = getattr(target, part)
        tensor = getattr(source, leaf)
        if isinstance(tensor, nn.Parameter):
            target.register_parameter(leaf, tensor)
        else:
            target.register_buffer(leaf, tensor)
    return holder
