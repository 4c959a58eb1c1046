"""Experts into the order that a placement wants, with their routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import Refused
from moeify.ir.emit import Emitter, fake_result
from moeify.ir.expert_calls import open_call, tag_untagged
from moeify.ir.metadata import tag
from moeify.ir.no_expert import may_lack_experts
from moeify.ir.program import Program
from moeify.ir.router_rows import RouterRows, router_rows
from moeify.ir.sharding import sharding
from moeify.ir.weights import WeightRecipe
from moeify.pipeline.base import Log, Pass

_aten = torch.ops.aten
_moe = torch.ops.moeify
KEY = "placement"  # of Program.provenance: anchor -> the expert of every place


@dataclass(frozen=True)
class PlaceExperts(Pass):
    """Put experts where the placement in ``program.provenance["placement"]`` wants them; the function stays.

    Before:  logits = linear(x_TD, router.weight_ED); values, experts_TK = sort(logits)
             y_TD = moe.dispatch_ffn(x_TD, experts_TK, weights_TK, up_EFD, ...)
    After:   the same graph; the rows of router.weight_ED and the experts of up_EFD, ... stand in the new order

    With copies of an expert, or behind a router that does more than score each expert by a row of its own:

    After:   place = table[experts_TK, token modulo the expert's copies]
             y_TD = moe.dispatch_ffn(x_TD, place, weights_TK, up_PFD, ...)     P places, copies spread evenly

    The placement is a mapping from the block's anchor to the expert of every place (see
    ``moeify.distributed.placement``); a block it does not name stays. Equal router rows score alike, and of equal
    scores the lower expert is taken: such experts keep their order among themselves. Copies are for inference: in
    training they would drift apart, so stacked weights with copies are frozen.

    Raises Refused without a placement, for one that leaves an expert out, and for a program that is sharded already.
    """

    name: ClassVar[str] = "place-experts"

    def apply(self, program: Program, log: Log) -> None:
        wanted = program.provenance.get(KEY)
        if not wanted:
            raise Refused("there is no placement to put experts by", hint="measure loads and place them first")
        if sharding(program) is not None:
            raise Refused("the program is sharded already", hint="place-experts goes before shard-experts")
        tag_untagged(program)
        calls: dict[str, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.target in (_moe.dispatch_ffn.default, _moe.permute.default):
                mark = tag(node)
                assert mark is not None, f"{node.name} has no tag"
                calls.setdefault(mark.block, []).append(node)
        for block, nodes in calls.items():
            if block in wanted:
                log(_place(program, block, nodes, wanted[block]))
        program.graph_module.recompile()


def _place(program: Program, block: str, calls: list[fx.Node], order: Sequence[int]) -> str:
    experts = program.parameter(f"{block}.experts.up").shape[0]
    if set(order) != set(range(experts)):
        raise Refused(f"the placement does not have each of the {experts} experts", where=block)
    copies = len(order) - experts
    found = router_rows(program, block, [(node.args[1], experts) for node in calls])
    if copies or isinstance(found, str):
        for node in calls:
            _look_up(program, node, order, experts)
        how = f"{copies} copies, looked up for each token" if copies else f"looked up for each token: {found}"
    else:
        order = _stable(order, found.equal(program))
        _fold(program, found, order)
        how = "folded into the router"
    names = [name for name, _ in program.graph_module.named_parameters(remove_duplicate=False)]
    for name in names:
        if name.startswith(f"{block}.experts."):
            _reorder(program, name, order, frozen=copies > 0)
    if copies:
        for node in calls:
            _retype(program, node, len(order))
    moved = sum(place != expert for place, expert in enumerate(order[:experts]))
    return f"{block}: {moved} of {experts} experts move, {how}"


def _stable(order: Sequence[int], equal: Sequence[Sequence[int]]) -> list[int]:
    """The order, experts of one class of ``equal`` ascending among the places that they have together."""
    fixed = list(order)
    for members in equal:
        places = [place for place, expert in enumerate(order) if expert in set(members)]
        for place, expert in zip(places, sorted(members), strict=True):
            fixed[place] = expert
    return fixed


def _fold(program: Program, rows: RouterRows, order: Sequence[int]) -> None:
    for name in rows.by_row:
        _reorder(program, name, order, frozen=False)
    for name in rows.by_value:
        table = program.parameter(name)
        program.set_buffer(name, _places(order).to(table.device)[table])


def _places(order: Sequence[int]) -> Tensor:
    """The place of every expert."""
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(len(order))
    return places


def _reorder(program: Program, name: str, order: Sequence[int], *, frozen: bool) -> None:
    """``weight[order]``; a weight that is a recipe still stays one."""
    weight = program.parameter(name)
    trained = weight.requires_grad and not frozen
    index = torch.tensor(order)
    recipe = program.pending.get(name)
    if recipe is None:
        program.set_parameter(name, weight.detach().index_select(0, index.to(weight.device)), trained)
        return

    def compute(*sources: Tensor) -> Tensor:
        whole = recipe.compute(*sources)
        return whole.index_select(0, index.to(whole.device))

    shape = (len(order), *recipe.shape[1:])
    program.add_recipe(WeightRecipe(name, shape, recipe.sources, compute, recipe.dtype), trained)


def _look_up(program: Program, call: fx.Node, order: Sequence[int], experts: int) -> None:
    """Let the call read places in the place of experts."""
    mark = tag(call)
    assert mark is not None
    chosen = call.args[1]
    assert isinstance(chosen, fx.Node)
    places: list[list[int]] = [[] for _ in range(experts)]
    for place, expert in enumerate(order):
        places[expert].append(place)
    if may_lack_experts(chosen):
        places.append([len(order)])  # the number of no expert
    most = max(map(len, places))
    device = chosen.meta["val"].device
    emit = Emitter(program, call, mark.block, mark.call, chosen)

    def constant(name: str, value: list) -> fx.Node:
        full = f"{mark.block}.placement.{name}"
        program.set_buffer(
            full, torch.tensor(value, dtype=torch.int64, device=device if device.type != "meta" else "cpu")
        )
        return emit.parameter("router", full)

    if most == 1:
        flat = emit.call("router", _aten.reshape.default, chosen, [-1])
        found = emit.call("router", _aten.index_select.default, constant("places", [p[0] for p in places]), 0, flat)
    else:
        # Row e repeats the places of expert e; a token takes the one of its number modulo how many there are.
        rows = constant("places", [p[i % len(p)] for p in places for i in range(most)])
        flat = emit.call("router", _aten.reshape.default, chosen, [-1])
        count = emit.call("router", _aten.index_select.default, constant("copies", [len(p) for p in places]), 0, flat)
        # Numbers of tokens, not of rows: an expert that is always a token's first would see every K-th row alone.
        ones = emit.call("router", _aten.ones_like.default, chosen)
        tokens = emit.call("router", _aten.cumsum.default, ones, 0)
        number = emit.call("router", _aten.reshape.default, tokens, [-1])
        copy = emit.call("router", _aten.remainder.Tensor, number, count)
        row = emit.call("router", _aten.mul.Tensor, flat, most)
        found = emit.call(
            "router", _aten.index_select.default, rows, 0, emit.call("router", _aten.add.Tensor, row, copy)
        )
    shaped = emit.call("router", _aten.view_as.default, found, chosen)
    call.update_arg(1, shaped)


def _retype(program: Program, call: fx.Node, places: int) -> None:
    """The types of what the number of experts is part of."""
    nodes = [call]
    if call.target == _moe.permute.default:
        call.update_arg(2, places)
        unpermute = next(
            user for result in call.users for user in result.users if user.target == _moe.unpermute.default
        )
        nodes += [*call.users, *open_call(unpermute).inside]
    mode = call.args[0].meta["val"].fake_mode  # type: ignore[union-attr]
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and ".experts." in str(source.target):
                with mode:
                    source.meta["val"] = torch.empty(
                        program.parameter(str(source.target)).shape,
                        dtype=source.meta["val"].dtype,
                        device=source.meta["val"].device,
                    )
        node.meta["val"] = fake_result(program, node, mode)
