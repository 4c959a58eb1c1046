"""find-ffn: each feed-forward block becomes one moe.ffn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir import metadata
from moeify.ir.block import Block, CallSite, NearMiss, WeightRef
from moeify.ir.program import Program
from moeify.match import Match, find
from moeify.pipeline.base import Log, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class FindFfn(Pass):
    """Find the feed-forward blocks; those whose activation has a name become one ``moe.ffn`` per call.

    Before:  u = linear(x, w, b); h = gelu(u); d = dropout(h, 0.1, False); y = linear(d, v, c)
    After:   y = moe.ffn(x, w, None, v, b, None, c, "gelu", 0.1)

    The others keep their nodes, and the block keeps what stands between its linear layers as a function of rows. Either
    way the output node of each call is tagged. Near misses are logged with the reason; a block that changes its
    floating-point type between its layers is one of them.
    """

    name: ClassVar[str] = "find-ffn"

    def apply(self, program: Program, log: Log) -> None:
        found = find(program.graph_module)
        mixed = {block.anchor: miss for block in found.blocks if (miss := _mixed_types(program, block))}
        program.blocks = [block for block in found.blocks if block.anchor not in mixed]
        program.near_misses = [*found.near_misses, *mixed.values()]
        blocks = {block.anchor: block for block in program.blocks}
        writer = _Writer(program.graph_module)
        for match in found.matches:
            if match.anchor in blocks:
                writer.write(blocks[match.anchor], match)
        writer.finish()
        for block in program.blocks:
            calls = f", {len(block.calls)} calls" if len(block.calls) > 1 else ""
            gated = " gated" if block.gated else ""
            log(f"{block.path or '(root)'}: {block.d_model} -> {block.d_ff}{gated} {block.activation}{calls}")
        for miss in program.near_misses:
            log(f"not a block: {miss.path or '(root)'}: {miss.reason}")


def _mixed_types(program: Program, block: Block) -> NearMiss | None:
    """Why a block is none when its weights differ in type: one moe.ffn, and one stack of experts, has one type."""
    dtypes = {program.parameter(ref.parameter).dtype for ref in block.weights.values()}
    if len(dtypes) == 1:
        return None
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return NearMiss(block.path, f"its weights are of more than one type, {names}", block.source)


class _Writer:
    """Replaces calls by moe.ffn nodes in one graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.weights = {str(node.target): node for node in reversed(self.graph.nodes) if node.op == "get_attr"}
        self.dead: list[fx.Node] = []
        self.renamed: dict[str, str] = {}  # of outputs that were replaced and may be the input of a later call

    def write(self, block: Block, match: Match) -> None:
        """One call. The call site then names the nodes of the rewritten graph."""
        if block.activation == "custom":
            match.y.meta[metadata.KEY] = metadata.Tag(block.anchor, match.call, "output")
            site = block.calls[match.call]
            block.calls[match.call] = CallSite(self.renamed.get(site.input, site.input), site.output, site.nodes)
            return
        down = match.region.down
        x = match.x
        with self.graph.inserting_before(down.node):
            rank, axis = len(x.meta["val"].shape), match.region.ups[0].x_axis
            moved = axis != rank - 1
            if moved:
                x = self._add(aten.permute.default, (x, [d for d in range(rank) if d != axis] + [axis]), match)
            args = [self._weight(block.weights.get(role), match) for role in ("up", "gate", "down")]
            args += [self._weight(block.weights.get(f"{role}_bias"), match) for role in ("up", "gate", "down")]
            extra = (block.hidden_dropout,) if block.hidden_dropout else ()
            ffn = self._add(
                torch.ops.moeify.ffn.default,
                (x, *args, block.activation, *extra),
                match,
                None if moved else down.node.meta["val"],
            )
            y = ffn
            if moved:
                back = list(range(rank - 1))
                back.insert(axis, rank - 1)
                y = self._add(aten.permute.default, (y, back), match)
        ffn.meta[metadata.KEY] = metadata.Tag(block.anchor, match.call, "output")
        down.node.replace_all_uses_with(y)
        self._move_sizes(match)
        self.dead += [down.node, down.core, *match.region.nodes]
        self.dead += [n for up in match.region.ups for n in (up.node, up.core)]
        self.renamed[down.node.name] = y.name
        block.calls[match.call] = CallSite(x.name, ffn.name, (ffn.name,))

    def finish(self) -> None:
        """Erase what was replaced, and the views of weights that only it read."""
        self.dead = list(dict.fromkeys(self.dead))
        for node in sorted(self.dead, key=self.order.__getitem__, reverse=True):
            self._erase(node)
        self.graph_module.recompile()

    def _erase(self, node: fx.Node) -> None:
        if node.users or node.op not in ("call_function", "get_attr"):
            return
        before = node.all_input_nodes
        self.graph.erase_node(node)
        for one in before:
            if one.op == "get_attr" or _reads_parameters_only(one):
                self._erase(one)

    def _add(self, target: Callable[..., Any], args: tuple, match: Match, val: Any = None) -> fx.Node:
        """A new node; its type is ``val`` where that is known, as inferring it costs more than the rest together."""
        node = self.graph.call_function(target, args)
        if val is None:
            with torch.no_grad():
                val = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        node.meta["val"] = val
        for key in ("nn_module_stack", "stack_trace"):
            if key in match.region.down.core.meta:
                node.meta[key] = match.region.down.core.meta[key]
        return node

    def _weight(self, ref: WeightRef | None, match: Match) -> fx.Node | None:
        """A parameter, and its canonical view as ATen nodes."""
        if ref is None:
            return None
        node = self.weights[ref.parameter]
        for op, *rest in ref.steps:
            if op == "t":
                node = self._add(aten.t.default, (node,), match)
            elif op == "reshape":
                node = self._add(aten.reshape.default, (node, list(rest)), match)
            elif op == "permute":
                node = self._add(aten.permute.default, (node, list(rest)), match)
            else:
                node = self._add(aten.slice.Tensor, (node, *rest), match)
        return node

    def _move_sizes(self, match: Match) -> None:
        """Sizes that were read off values inside the block are read off its input."""
        x_val, axis = match.x.meta["val"], match.region.ups[0].x_axis
        for node in (*(up.node for up in match.region.ups), *match.region.nodes):
            for user in list(node.users):
                if user.target is not aten.sym_size.int or len(node.meta["val"].shape) != len(x_val.shape):
                    continue
                dim = user.args[1] % len(x_val.shape)  # type: ignore[operator]
                if dim != axis and str(node.meta["val"].shape[dim]) == str(x_val.shape[dim]):
                    user.args = (match.x, dim)


def _reads_parameters_only(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and bool(node.all_input_nodes)
        and all(n.op == "get_attr" or _reads_parameters_only(n) for n in node.all_input_nodes)
    )
