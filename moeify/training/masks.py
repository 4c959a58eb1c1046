"""Which inputs of a captured model say what is padding, block by block."""

from __future__ import annotations

from collections.abc import Mapping

from moeify.backends.calls import find_calls
from moeify.fitting.padding import mask_of_rows, masks_of
from moeify.ir.program import Program


def masks_of_blocks(program: Program, paths: Mapping[str, str]) -> dict[str, int]:
    """By the path of a converted block whose rows an input masks: the position of that input. ``paths`` gives the
    module path of an anchor.
    """
    masks = masks_of(program.graph, program.inputs)
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[str, int] = {}
    for call in find_calls(program.graph):
        position = mask_of_rows(program.graph, masks, nodes[call.rows])
        if position is not None:
            found[paths.get(call.block, call.block)] = position
    return found
