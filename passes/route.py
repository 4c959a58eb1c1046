"""Routers in the place of the uniform weights that make-experts leaves."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import MoeifyError, Refused
from moeify.experts.planning import plan_block
from moeify.ir.block import Block
from moeify.ir.causality import causal_node
from moeify.ir.emit import Emitter, fake_result
from moeify.ir.inline import inline, trace
from moeify.ir.metadata import tag
from moeify.ir.program import Program
from moeify.ir.token_ids import TokenIds, embedded_ids, ids_of_rows
from moeify.ir.weights import generator_for
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.router import MixingSpec, Router, RouterSpec
from moeify.pipeline.base import Log, Pass

_aten = torch.ops.aten
_DISPATCH = torch.ops.moeify.dispatch_ffn.default
_PERMUTE = torch.ops.moeify.permute.default
_UNPERMUTE = torch.ops.moeify.unpermute.default


@dataclass(frozen=True)
class Route(Pass):
    """Give every mixture its router: ordinary ATen nodes, inlined from the router's module.

    Before:  y_TD = moe.dispatch_ffn(x_TD, all experts, 1 / E, ...)
    After:   logits = linear(x_TD, router.weight); values, order = sort(logits); ...
             y_TD = moe.dispatch_ffn(x_TD, experts_TK, weights_TK, ...)

    The router's parameters are ``{anchor}.router.*``, drawn by the router's own ``reset`` or, where they start from
    the block's weights, recipes (``pending``); a block that is called several times has one router. Refuses a router
    that needs token ids where no embedded tensor has the shape of the block's rows, and one that mixes tokens where the
    graph shows that the model is causal.
    """

    name: ClassVar[str] = "route"

    def apply(self, program: Program, log: Log) -> None:
        routing = {block.anchor: _Routing(program, block) for block in program.converted()}
        ids: list[TokenIds] | None = None
        weights: dict[tuple[str, int], fx.Node] = {}
        replaced: list[fx.Node] = []
        for node in list(program.graph.nodes):
            mark = tag(node)
            if mark is None or mark.block not in routing or node.op != "call_function":
                continue
            if node.target in (_DISPATCH, _PERMUTE):
                here = routing[mark.block]
                if here.spec.needs_token_ids and ids is None:
                    ids = embedded_ids(program.graph)
                emit = Emitter(program, node, mark.block, mark.call, node)
                mode = node.args[0].meta["val"].fake_mode
                experts_TK, weights_TK = here.inline(emit, node.args[0], ids or [], log)
                weights[mark.block, mark.call] = weights_TK
                replaced.append(node.args[1])
                node.update_arg(1, experts_TK)
            if node.target in (_DISPATCH, _UNPERMUTE):
                replaced.append(node.args[2])
                node.update_arg(2, weights[mark.block, mark.call])
            if (mark.block, mark.call) in weights:
                # From here on the rows of the call are T * K, no longer T * E.
                node.meta["val"] = fake_result(program, node, mode)
        for node in replaced:
            _erase_unread(node)
        program.graph_module.recompile()


@dataclass
class _Routing:
    """The router of one block: its module, built and drawn when the first call is reached."""

    program: Program
    block: Block
    text: str = field(init=False)
    spec: RouterSpec = field(init=False)
    router: Router | None = None

    def __post_init__(self) -> None:
        self.text = self.program.recipe.for_block(self.block.path).router
        self.spec = ROUTERS.parse(self.text).for_block(self.block)
        if isinstance(self.spec, MixingSpec) and not self.spec.allow_causal:
            _check_not_causal(self.program, self.spec, self.block)

    def inline(self, emit: Emitter, x_TD: fx.Node, ids: list[TokenIds], log: Log) -> tuple[fx.Node, fx.Node]:
        args, vocabulary = [x_TD], None
        if self.spec.needs_token_ids:
            found = self._token_ids(x_TD, ids)
            args.append(emit.call("router", _aten.reshape.default, found.node, [-1]))
            vocabulary = found.vocabulary
        if self.router is None:
            self.router = self._build(x_TD, vocabulary, log)
        dtype = x_TD.meta["val"].dtype
        graph = _traced(self.spec, self.block.d_model, self.router.num_experts, self.router.top_k, dtype, vocabulary)
        prefix = f"{self.block.anchor}.router."
        experts_TK, weights_TK = inline(emit, graph, args, prefix.__add__, "router")
        return experts_TK, weights_TK

    def _build(self, x_TD: fx.Node, vocabulary: int | None, log: Log) -> Router:
        program, block = self.program, self.block
        recipe, plan = program.recipe.for_block(block.path), plan_block(program, block)
        val = x_TD.meta["val"]
        try:
            router = self.spec.build(
                block.d_model, plan.num_experts, recipe.top_k, dtype=val.dtype, vocabulary=vocabulary
            )
            router.reset(generator_for(program.recipe.seed, f"{block.anchor}.router"), plan.router_repeat)
            starts = self.spec.recipes(block, plan.units, val.dtype)
        except MoeifyError as error:
            error.where = error.where or block.path
            raise
        # A capture on the meta device has no device of its own yet.
        device = val.device if val.device.type != "meta" else torch.device("cpu")
        trained = program.parameter(plan.weights["up"].name).requires_grad
        for name, value in router.named_parameters():
            program.set_parameter(f"{block.anchor}.router.{name}", value.detach().to(device), trained)
        for start in starts:
            program.add_recipe(start, trained)
        for name, table in router.named_buffers():
            program.set_buffer(f"{block.anchor}.router.{name}", table.to(device))
        log(f"{block.path}: {self.text} over {plan.num_experts} experts, {recipe.top_k} per token")
        return router

    def _token_ids(self, x_TD: fx.Node, ids: list[TokenIds]) -> TokenIds:
        x = x_TD
        while x.target == _aten.reshape.default and (mark := tag(x)) is not None and mark.block == self.block.anchor:
            x = x.args[0]  # type: ignore[assignment]
        found = ids_of_rows(ids, x)
        if found is None:
            shape = list(x.meta["val"].shape[:-1])
            raise Refused(
                f"the {self.spec.name} router needs token ids, and no embedding of the model reads a tensor of the "
                f"shape of this block's rows, {shape}",
                where=self.block.path,
                hint="choose another router for this block",
            )
        return found


def _check_not_causal(program: Program, spec: MixingSpec, block: Block) -> None:
    node = causal_node(program)
    if node is None:
        return
    training = spec.mixes_tokens == "in training"
    raise Refused(
        f"the {spec.name} router mixes tokens{' in training' if training else ''}: a token's experts depend on tokens "
        f"after it, which this model keeps from it (%{node.name})",
        where=block.path,
        hint=f"choose another router, or {spec.name}{{allow-causal=true}} if "
        + ("that is meant: evaluation does not mix" if training else "every call has whole texts"),
    )


@functools.lru_cache(maxsize=16)
def _traced(
    spec: RouterSpec, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype, vocabulary: int | None
) -> fx.GraphModule:
    """The router's graph; the values of its parameters are no part of it, so one serves all blocks of a size."""
    router = spec.build(d_model, num_experts, top_k, dtype=dtype, vocabulary=vocabulary)
    x, token_ids = torch.zeros(4, d_model, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    args = (x, token_ids) if spec.needs_token_ids else (x,)
    return trace(router, args, dynamic=range(len(args)))


def _erase_unread(node: fx.Node) -> None:
    """Take out a node that nobody reads, then what only it read."""
    if node.users or node.op != "call_function":
        return
    read = node.all_input_nodes
    node.graph.erase_node(node)
    for source in read:
        mark = tag(source)
        if mark is not None and mark.role == "router":
            _erase_unread(source)
