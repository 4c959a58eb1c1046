"""What stands against cutting a block along its hidden width."""

from __future__ import annotations

from moeify.errors import Refused
from moeify.ir.block import Block


def check_can_be_cut(block: Block, parts: str) -> None:
    """Raises Refused for a block whose hidden units are not each other's equals: a norm over them, or an activation
    that reads a tensor with a value for each. ``parts`` is what the block would be cut into, for the message.
    """
    if block.region is None:
        return
    if not block.region_is_pointwise:
        raise Refused(
            f"the hidden value is normalised over its whole width: it cannot be cut into {parts}",
            where=block.path,
            hint="use --method copy",
        )
    wide = _wide_parameter(block)
    if wide is not None:
        raise Refused(
            f"the activation reads a tensor over the hidden width, {wide}: it cannot be cut into {parts}",
            where=block.path,
            hint="use --method copy",
        )


def _wide_parameter(block: Block) -> str | None:
    """The first tensor of more than one value that the activation reads."""
    region = block.region
    assert region is not None
    for node in region.graph.find_nodes(op="get_attr"):
        owner, _, leaf = node.target.rpartition(".")
        if getattr(region.get_submodule(owner), leaf).numel() > 1:
            return node.target
    return None
