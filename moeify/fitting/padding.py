"""Which rows of a block are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from moeify.ir.program import InputSpec
from moeify.ir.token_ids import TokenIds, ids_of_rows

Masks = Mapping[TokenIds, fx.Node]  # an integer input [batch, sequence] -> the mask of its tokens


def masks_of(graph: fx.Graph, inputs: Sequence[InputSpec]) -> Masks:
    """The integer inputs named ``*mask*`` [batch, sequence], zero where a token is padding, and what they are of.

    A capture need not know that ids and their mask have the same sizes, as a mask may broadcast: the names say so.
    """
    whole = [
        (node, spec)
        for node, spec in zip(graph.find_nodes(op="placeholder"), inputs)
        if len(spec.shape) == 2 and not spec.dtype.is_floating_point
    ]
    masks = {spec.shape: node for node, spec in reversed(whole) if "mask" in spec.name}
    return {TokenIds(node, 2, True): masks[spec.shape] for node, spec in whole if spec.shape in masks}


def mask_of_rows(graph: fx.Graph, masks: Masks, x: fx.Node) -> int | None:
    """The position among the graph's inputs of the mask that belongs to the rows of ``x``; None where none does."""
    found = ids_of_rows(list(masks), x)
    return None if found is None else graph.find_nodes(op="placeholder").index(masks[found])
