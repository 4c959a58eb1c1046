"""Exchanges into the functional collectives of PyTorch, which its compiler knows and overlaps with computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import BadOption
from moeify.ir.emit import Emitter, arguments
from moeify.ir.metadata import KEY, tag
from moeify.ir.program import Program
from moeify.pipeline.base import Log, Pass

_aten = torch.ops.aten
_moe = torch.ops.moeify


@dataclass(frozen=True)
class LowerExchange(Pass):
    """Put ``_c10d_functional`` in the place of this dialect's exchanges, for the process group named ``group``.

    Before:  y = moe.all_to_all_rows(x, out_W, in_W, rows, "ep", W, block)
    After:   o0 = item(out_W[0]); ...; i0 = item(in_W[0]); ...
             y = wait_tensor(_c10d_functional.all_to_all_single(x, [o0, ...], [i0, ...], group))

    The graph grows with the number of ranks and holds the group's name (``mesh.get_group("ep").group_name``), so that
    this is the last pass, run where the graph will run. The size of the group is no longer checked at each call, and
    errors are torch's own. Whoever runs the graph imports ``torch.distributed._functional_collectives`` first: without
    it the collective has no gradient, and says nothing.
    """

    name: ClassVar[str] = "lower-exchange"

    group: str = ""

    def apply(self, program: Program, log: Log) -> None:
        if not self.group:
            raise BadOption("lower-exchange needs the name of a process group", hint="write lower-exchange{group=NAME}")
        import torch.distributed._functional_collectives as collectives  # registers the gradient

        del collectives
        splits: dict[fx.Node, list[fx.Node]] = {}
        count = 0
        for node in list(program.graph.nodes):
            if node.target == _moe.all_to_all_rows.default:
                self._rows(program, node, splits)
            elif node.target == _moe.all_to_all_even.default:
                ones = [1] * arguments(node)["group_size"]
                self._replace(program, node, arguments(node)["x"], ones, ones)
            else:
                continue
            count += 1
        program.graph_module.recompile()
        log(f"{count} exchanges lowered to functional collectives of the group {self.group!r}")

    def _rows(self, program: Program, node: fx.Node, splits: dict[fx.Node, list[fx.Node]]) -> None:
        given = arguments(node)
        emit = _emitter(program, node)
        for name in ("out_splits_W", "in_splits_W"):
            source = given[name]
            if source not in splits:
                parts = [emit.call("dispatch", _aten.select.int, source, 0, r) for r in range(given["group_size"])]
                splits[source] = [emit.call("dispatch", _aten.item.default, part) for part in parts]
        self._replace(program, node, given["x_RD"], splits[given["out_splits_W"]], splits[given["in_splits_W"]])

    def _replace(self, program: Program, node: fx.Node, x: fx.Node, out_splits: Any, in_splits: Any) -> None:
        ops = torch.ops._c10d_functional
        with program.graph.inserting_before(node):
            args = (x, list(out_splits), list(in_splits), self.group)
            started = program.graph.call_function(ops.all_to_all_single.default, args)
            done = program.graph.call_function(ops.wait_tensor.default, (started,))
        for new in (started, done):
            # Not computed: the sizes of a collective add up its splits, and those of the exchange are known by one
            # name.
            new.meta = {**node.meta, "val": node.meta["val"]}
        node.replace_all_uses_with(done)
        program.graph.erase_node(node)


def _emitter(program: Program, node: fx.Node) -> Emitter:
    mark = tag(node)
    assert mark is not None, f"{node.name} has no {KEY} tag"
    return Emitter(program, node, mark.block, mark.call, node)
