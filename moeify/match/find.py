"""Finding the feed-forward blocks of a graph. Pure: the graph is read, never changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from moeify.ir.block import Block, CallSite, NearMiss, WeightRef
from moeify.ir.where import common_path, module_path, source_line
from moeify.match import context
from moeify.match.axes import MixesRows
from moeify.match.linear import LINEAR_NAMES, Linear, linears
from moeify.match.ops import data_inputs, is_pointwise, name_of, shape
from moeify.match.owner import Modules, Place
from moeify.match.probe import Probe, probe
from moeify.match.region import (
    Region,
    adapter,
    blocker_reason,
    grow,
    hidden_dropout,
    outside_readers,
)
from moeify.match.rows import extract
from moeify.match.signature import signature
from moeify.match.weights import split_fused, weights_of

_LORA = "its weights carry low-rank adapters (LoRA): merge them first"


@dataclass(frozen=True)
class Match:
    """One call of a block in the graph that was searched."""

    anchor: str
    call: int
    region: Region

    @property
    def x(self) -> fx.Node:
        return self.region.ups[0].x

    @property
    def y(self) -> fx.Node:
        return self.region.down.node


@dataclass
class Found:
    """The result of a search: the blocks, their calls in graph order, and the places that were refused."""

    blocks: list[Block] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    visited: int = 0  # nodes looked at, for the test that the search is linear


def find(graph_module: fx.GraphModule) -> Found:
    """Every feed-forward block of a captured graph, and every place that looks like one and is not."""
    return _Search(graph_module).run()


class _Refused(Exception):
    """The candidate is not a block; the reason in one line."""


class _NotACandidate(Exception):
    """Nothing here looks like a block."""


class _Search:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        graph = graph_module.graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.linears = linears(graph)
        self.by_core = {linear.core: linear for linear in self.linears.values()}
        self.modules = Modules(graph)
        self.batch_sizes = frozenset(
            str(shape(node)[0])
            for node in graph.nodes
            if node.op == "placeholder" and shape(node) and not (len(shape(node)) == 1 and _is_integer(node))
        )
        self.probes: dict[object, Probe | str] = {}
        self.by_weights: dict[tuple, Block] = {}
        self.found = Found()
        self.missed: dict[tuple[str, str], NearMiss] = {}

    def run(self) -> Found:
        used: set[Linear] = set()
        heads = []
        for down in self.linears.values():
            region = grow(down, self.linears, self.order)
            self.found.visited += len(region.nodes) + len(region.blockers) + len(region.ups) + 1
            try:
                self._accept(region)
                used |= {*region.ups, down}
            except _Refused as reason:
                self._miss(common_path([module_path(n.core) for n in (*region.ups, down)]), str(reason), down.core)
                used |= {*region.ups, down}
            except _NotACandidate:
                heads.append(down)
        for linear in heads:
            if linear not in used and context.is_head(linear, self.order):
                self._miss(module_path(linear.core), "an output head: its result is the model's output", linear.core)
        self._note_regions()
        self.found.near_misses = list(self.missed.values())
        self.found.blocks = list(self.by_weights.values())
        return self.found

    def _miss(self, path: str, reason: str, node: fx.Node) -> None:
        self.missed.setdefault((path, reason), NearMiss(path, reason, source_line(node)))

    def _note_regions(self) -> None:
        """Name the subgraphs that hold layers and are not searched."""
        for node in self.graph_module.graph.nodes:
            if node.op != "get_attr":
                continue
            body = getattr(self.graph_module, str(node.target), None)
            if isinstance(body, fx.GraphModule) and any(name_of(n) in LINEAR_NAMES for n in body.graph.nodes):
                for user in node.users:
                    reason = f"it is inside a {user.target} region (autocast or control flow), which is not searched"
                    self._miss(module_path(user), reason, user)

    def _accept(self, region: Region) -> None:
        """Record a call of a block. Raises _Refused or _NotACandidate."""
        down, ups = region.down, region.ups
        self._is_candidate(region)
        for linear in (*ups, down):
            if linear.problem:
                raise _Refused(linear.problem)
        self._is_closed(region)
        x, d_in, d_ff = ups[0].x, ups[0].d_in, down.d_in
        rows = context.row_kind(x, ups[0].x_axis, self.batch_sizes, self.linears)
        found = self._probe(region)
        around = context.surroundings(x, down.node, self.order)
        reason = context.refusal(x, down, d_in, d_ff, around, rows, self.linears, self.order)
        if reason:
            raise _Refused(reason)
        layout = _layout(region)
        self._record(region, found, rows, layout)

    def _is_candidate(self, region: Region) -> None:
        ups = region.ups
        if region.blockers:
            reason = blocker_reason(region, self.linears)
            if reason:
                raise _Refused(reason)
            raise _NotACandidate
        if not ups or not any(is_pointwise(node) or name_of(node) == "glu" for node in region.nodes):
            raise _NotACandidate
        if len(ups) > 2 or not context.same_tensor(ups):
            bent = any(is_pointwise(n) and name_of(n) not in ("add", "to", "clone") for n in region.nodes)
            if bent and adapter(ups, self.linears):
                raise _Refused(_LORA)
            if len(ups) == 2 and any(name_of(n) == "mul" and _joins(n, region) for n in region.nodes):
                raise _Refused("the two layers above it read different tensors")
            raise _NotACandidate

    def _is_closed(self, region: Region) -> None:
        readers = outside_readers(region)
        if not readers:
            return
        reader = readers[0]
        if reader in self.by_core:
            fed = [self.by_core[user] for user in self.by_core[reader].node.users if user in self.by_core]
            if adapter(fed, self.linears):
                raise _Refused(_LORA)
        if reader.op == "output":
            raise _Refused("the hidden value is also an output of the model")
        raise _Refused(f"the hidden value is also read by {name_of(reader) or reader.name}")

    def _probe(self, region: Region) -> Probe:
        key = signature(region)
        if key not in self.probes:
            try:
                sources, hidden = _ends(region)
                self.probes[key] = probe(region.nodes, sources, hidden, self.graph_module)
            except MixesRows as reason:
                self.probes[key] = str(reason)
        found = self.probes[key]
        if isinstance(found, str):
            raise _Refused(found)
        if not found.nonlinear:
            raise _NotACandidate
        return found

    def _record(self, region: Region, found: Probe, rows: str, layout: str) -> None:
        weights = weights_of(region, found)
        key = tuple((role, ref.parameter, ref.steps) for role, ref in weights.items())
        x, y = region.ups[0].x, region.down.node
        nodes = {n for layer in (*region.ups, region.down) for n in (layer.core, layer.node)} | set(region.nodes)
        site = CallSite(x.name, y.name, tuple(n.name for n in sorted(nodes, key=self.order.__getitem__)))
        place = self.modules.place(region)
        block = self.by_weights.get(key)
        if block is None:
            block = self._new_block(region, found, rows, layout, weights, place)
            self.by_weights[key] = block
        elif block.owner is not None and (place.owner, place.output_dropout) != (
            block.owner,
            block.output_dropout,
        ):
            block.owner, block.output_dropout = None, 0.0
        block.calls.append(site)
        self.found.matches.append(Match(block.anchor, len(block.calls) - 1, region))

    def _new_block(
        self,
        region: Region,
        found: Probe,
        rows: str,
        layout: str,
        weights: dict[str, WeightRef],
        place: Place,
    ) -> Block:
        dropout = hidden_dropout(region)
        named = found.activation is not None and dropout is not None
        block = Block(
            path=place.path,
            anchor=self._anchor(place, region),
            calls=[],
            activation=str(found.activation) if named else "custom",
            region=None if named else self._row_function(region, found),
            region_is_pointwise=found.pointwise,
            hidden_dropout=float(dropout or 0.0) if named else 0.0,
            layout=layout,
            rows=rows,
            owner=place.owner,
            output_dropout=place.output_dropout,
            linears=place.linears,
            source=source_line(region.down.core),
            **weights,  # type: ignore[arg-type]
        )
        if rows == "sample":
            block.reason = "one row per example: a router would send whole examples to experts"
        elif rows == "channel":
            block.reason = "its features are positions (token mixing): a router would send channels to experts"
        return block

    def _anchor(self, place: Place, region: Region) -> str:
        taken = {block.anchor for block in self.by_weights.values()}
        up_path = self.modules.layer_path(region.ups[0])
        anchor = place.owner or up_path or (f"{place.path}.moe" if place.path else "moe")
        name, count = anchor, 1
        while name in taken:
            name, count = f"{anchor}_{count}", count + 1
        return name

    def _row_function(self, region: Region, found: Probe) -> fx.GraphModule:
        sources, hidden = _ends(region)
        module = extract(region.nodes, sources, hidden, self.graph_module)
        if found.layout is not None:
            split_fused(module, found.layout)
        return module


def _is_integer(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and not val.dtype.is_floating_point


def _joins(node: fx.Node, region: Region) -> bool:
    """A product of two values that both come from the layers above."""
    inside = set(region.nodes) | {up.node for up in region.ups}
    return len({n for n in data_inputs(node) if n in inside}) == 2


def _ends(region: Region) -> tuple[list[tuple[fx.Node, int]], tuple[fx.Node, int]]:
    return [(up.node, up.out_axis) for up in region.ups], (region.down.x, region.down.x_axis)


def _layout(region: Region) -> str:
    """Where the features are. Raises _Refused when in and out differ."""
    first, down = region.ups[0], region.down
    rank, out_rank = len(shape(first.x)), len(shape(down.node))
    if any(up.x is not first.x for up in region.ups):
        raise _Refused("the two layers above it read different views of one tensor")
    leading = [str(s) for d, s in enumerate(shape(first.x)) if d != first.x_axis]
    trailing = [str(s) for d, s in enumerate(shape(down.node)) if d != down.out_axis]
    if rank != out_rank or leading != trailing or (first.x_axis, rank) != (down.out_axis, out_rank):
        raise _Refused("rows are reshaped or reordered between the linear layers")
    if first.x_axis == rank - 1:
        return "channels-last"
    if first.x_axis == 1:
        return "channels-first"
    raise _Refused(f"its features are on axis {first.x_axis} of {rank}")
