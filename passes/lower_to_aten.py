"""The operators of this dialect into ATen, so that a graph runs where moeify is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import Refused
from moeify.ir.emit import Emitter, arguments
from moeify.ir.expert_calls import tag_untagged
from moeify.ir.inline import inline
from moeify.ir.metadata import KEY, Tag, tag
from moeify.ir.no_expert import fill_slots
from moeify.ir.plain_ops import PLAIN
from moeify.ir.program import Program
from moeify.passes.lower_experts import LowerExperts
from moeify.pipeline.base import Log, Pass
from moeify.pipeline.rules import is_moe

_EXCHANGES = (torch.ops.moeify.all_to_all_rows.default, torch.ops.moeify.all_to_all_even.default)


@dataclass(frozen=True)
class LowerToAten(Pass):
    """Put ATen operators in the place of every ``moe.*`` operator. After lower-exchange, where experts are sharded.

    Before:  h = moe.experts(rows_RD, counts_E, up_EFD, None, down_EDF, None, None, None, "relu")
    After:   c0 = item(counts_E[0]); ...; r0, r1, ... = split_with_sizes(rows_RD, [c0, c1, ...])
             h = cat([linear(relu(linear(r0, up_EFD[0])), down_EDF[0]), ...])

    The function and its gradients stay; see ``ir.plain_ops`` for what each operator becomes. The graph grows with the
    number of experts, the hidden values of all experts are kept for the backward pass, and no fused kernel is left:
    what runs with moeify is better off without this. Ranks that hold different numbers of experts have different
    graphs, which ``bind`` refuses.

    Raises Refused for exchanges that lower-exchange has not seen, and for operators without such a form: the noise of
    routers, which has a switch for training that ATen lacks.
    """

    name: ClassVar[str] = "lower-to-aten"

    def apply(self, program: Program, log: Log) -> None:
        _check(program)
        tag_untagged(program)
        fill_slots(program)
        LowerExperts().apply(program, Log())
        count = 0
        for node in [node for node in program.graph.nodes if node.target in PLAIN]:
            _open(program, node)
            count += 1
        program.graph_module.recompile()
        log(f"{count} operators opened")


def _check(program: Program) -> None:
    for node in program.graph.nodes:
        if node.target in _EXCHANGES:
            raise Refused(f"%{node.name} is an exchange between ranks", hint="run lower-exchange{group=NAME} before")
        if is_moe(node) and node.target not in PLAIN and node.target != torch.ops.moeify.dispatch_ffn.default:
            raise Refused(f"%{node.name} ({node.target}) has no form in ATen", hint="choose a router without noise")


def _open(program: Program, node: fx.Node) -> None:
    given = list(arguments(node).values())
    read = list(dict.fromkeys(value for value in given if isinstance(value, fx.Node)))
    mark = tag(node) or Tag("", 0, "dispatch")
    emit = Emitter(program, node, mark.block, mark.call, node)
    opened = inline(emit, _trace(node, given, read, emit.example.fake_mode), read, str, mark.role)
    if isinstance(opened, (tuple, list)):
        for user in list(node.users):  # getitem
            _replace(user, opened[user.args[1]])  # type: ignore[index]
        program.graph.erase_node(node)
    else:
        _replace(node, opened)


def _trace(node: fx.Node, given: list[Any], read: list[fx.Node], mode: FakeTensorMode) -> fx.GraphModule:
    """The ATen graph of the operator's function on these arguments, with a placeholder for each node in ``read``."""

    def call(*values: Any) -> Any:
        of = dict(zip(read, values))
        return PLAIN[node.target](*(of[x] if isinstance(x, fx.Node) else x for x in given))

    with mode:
        # Nodes may share one fake value, and the trace tells its inputs apart by identity.
        values = torch.utils._pytree.tree_map_only(torch.Tensor, torch.detach, [x.meta["val"] for x in read])
        # Above autograd: operators as they are written, not those of their gradients' bookkeeping.
        return make_fx(call, pre_dispatch=True)(*values)


def _replace(old: fx.Node, new: fx.Node) -> None:
    mark = tag(old)
    if mark is not None:
        new.meta[KEY] = mark
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
