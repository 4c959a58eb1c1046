"""Which tensor of a program holds the token ids that belong to the rows of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_aten = torch.ops.aten

# What may stand between an input and the embedding that reads it.
_TRANSPARENT = frozenset(
    {_aten.to.dtype, _aten.view.default, _aten.reshape.default, _aten.slice.Tensor, _aten.clone.default,
     _aten.contiguous.default, _aten._to_copy.default}
)  # fmt: skip


@dataclass(frozen=True)
class TokenIds:
    """An embedding's index tensor, and the number of rows of its table."""

    node: fx.Node
    vocabulary: int
    is_input: bool

    @property
    def placeholder(self) -> fx.Node:
        """The input that these are, perhaps in another shape or type; of ids that are an input alone."""
        node = self.node
        while node.op != "placeholder":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        return node


def embedded_ids(graph: fx.Graph) -> list[TokenIds]:
    """Every integer tensor that an embedding reads, inputs of the program first, larger tables first."""
    found = [
        TokenIds(ids, node.args[0].meta["val"].shape[0], _comes_from_input(ids))
        for node in graph.find_nodes(op="call_function", target=_aten.embedding.default)
        if isinstance(ids := node.args[1], fx.Node)
    ]
    # Position and segment ids are embedded as well: they are rarely inputs, and their tables are small.
    return sorted(found, key=lambda ids: (not ids.is_input, -ids.vocabulary))


def ids_of_rows(candidates: list[TokenIds], x: fx.Node) -> TokenIds | None:
    """The first candidate whose shape is the leading dimensions of ``x`` [..., D], known to be so for every input.

    Where the model merges the axes of its tokens before the block, the shape before that counts: rows keep their order.
    """
    for same in views_of(x):
        leading = same.meta["val"].shape[:-1]
        for ids in candidates:
            shape = ids.node.meta["val"].shape
            if len(shape) == len(leading) and all(statically_known_true(a == b) for a, b in zip(shape, leading)):
                return ids
    return None


def views_of(x: fx.Node) -> Iterator[fx.Node]:
    """``x`` [..., D], and what it is a view of with other leading axes: the same rows in the same order."""
    yield x
    while x.target in (_aten.view.default, _aten.reshape.default):
        source = x.args[0]
        assert isinstance(source, fx.Node)
        if not statically_known_true(source.meta["val"].shape[-1] == x.meta["val"].shape[-1]):
            return
        x = source
        yield x


def _comes_from_input(node: fx.Node) -> bool:
    while node.op == "call_function" and node.target in _TRANSPARENT:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node.op == "placeholder"
