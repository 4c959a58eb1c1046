"""Observing the routers of a graph, which holds their operators alone.

Each router is traced again with its observed values as outputs. What of that trace the graph has is found in it, from
the dispatch backwards; the rest is added, and a module that receives the values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import Refused, UsageError
from moeify.ir import devices
from moeify.ir.inline import trace
from moeify.nn.observed import NOTHING, WHAT, Keep, Observation
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.router import Router, RouterSpec

_moe = torch.ops.moeify
_EXPERTS_UP = ".experts.up"
_PREFIX = "moeify_observer_"


def attach_graph(model: fx.GraphModule, keep: Keep) -> Callable[[], None]:
    """``moeify.nn.observation.attach`` of a graph."""
    if any(node.op == "call_module" and str(node.target).startswith(_PREFIX) for node in model.graph.nodes):
        raise UsageError("the model is being observed already")
    calls = list(_calls(model))
    if not calls:
        raise UsageError(NOTHING, hint=WHAT)
    known = set(model.graph.nodes)
    routers: dict[str, tuple[RouterSpec, Router]] = {}
    names: list[str] = []

    def detach() -> None:
        for node in reversed(list(model.graph.nodes)):
            if node not in known:
                model.graph.erase_node(node)
        for name in names:
            model.delete_submodule(name)
        model.recompile()

    try:
        for number, call in enumerate(calls):
            if call.block not in routers:
                routers[call.block] = _router_of(model, call)
            spec, router = routers[call.block]
            values = _Values(model, call).nodes(spec, router)
            names.append(f"{_PREFIX}{number}")
            model.add_module(
                names[-1], _Recorder(keep, call.block, router, functools.partial(_tensors, model, call.block))
            )
            with model.graph.inserting_before(call.node):
                model.graph.call_module(names[-1], kwargs={**values, "inputs": call.x})
        devices.follow(model)  # a router is traced on the CPU
        model.recompile()
    except BaseException:
        detach()
        raise
    return detach


class _Recorder(nn.Module):
    def __init__(self, keep: Keep, block: str, router: Router, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.keep, self.block, self.tensors = keep, block, tensors
        self.routers = [router]  # in a list, so that its tensors are not the model's twice

    def forward(self, **values: Tensor) -> None:
        _share(self.routers[0], self.tensors())  # a model that was moved has other buffers
        self.keep(Observation(self.block, self.routers[0], values, self.training))


@dataclass(frozen=True)
class _Call:
    """A mixture's call in a graph: the node that reads the experts, and what it is given."""

    block: str
    node: fx.Node
    x: fx.Node
    experts: fx.Node
    weights: fx.Node
    num_experts: int  # of all ranks, where the experts are spread over some


def _calls(model: fx.GraphModule) -> Iterator[_Call]:
    for node in model.graph.nodes:
        if node.target == _moe.dispatch_ffn.default:
            anchor = _anchor([node])
            x, experts, weights = node.args[:3]
            yield _Call(anchor, node, x, experts, weights, len(model.get_parameter(anchor + _EXPERTS_UP)))
        elif node.target == _moe.unpermute.default:
            permute = node.args[1].args[0]
            inside, reader = [], permute
            while reader is not node:
                inside.append(reader)
                reader = reader.next
            yield _Call(_anchor(inside), node, permute.args[0], permute.args[1], node.args[2], permute.args[2])


def _unfilled(here: fx.Node, traced: fx.Node) -> fx.Node:
    """The router's own choice, where ``ir.no_expert.fill_slots`` has put a clamp after it."""
    clamp = torch.ops.aten.clamp.default
    return here.args[0] if here.target == clamp and traced.target != clamp else here  # type: ignore[return-value]


def _anchor(nodes: list[fx.Node]) -> str:
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target).endswith(_EXPERTS_UP):
                return str(source.target).removesuffix(_EXPERTS_UP)
    raise AssertionError(f"{nodes[0].name} reads no experts")


def _router_of(model: fx.GraphModule, call: _Call) -> tuple[RouterSpec, Router]:
    """The router of a block as a module that shares its tensors with the graph."""
    block = call.block
    report = getattr(model, "moeify_report", None)
    entry = next((entry for entry in report.blocks if entry.anchor == block), None) if report is not None else None
    if entry is None or entry.router is None or entry.top_k is None:
        raise UsageError(f"nothing says what the router of {block} is", hint="open the file with moeify.load")
    spec: RouterSpec = ROUTERS.parse(entry.router)
    up_EFD = model.get_parameter(f"{block}{_EXPERTS_UP}")
    tensors = _tensors(model, block)
    vocabulary = len(tensors["table"]) if spec.needs_token_ids else None
    with torch.device("meta"):
        router = spec.build(up_EFD.shape[2], call.num_experts, entry.top_k, dtype=up_EFD.dtype, vocabulary=vocabulary)
    _share(router, tensors)
    return spec, router.train(model.training)


def _tensors(model: fx.GraphModule, block: str) -> Mapping[str, Tensor]:
    """Parameters and buffers of a block's router, by the names that it has for them."""
    mine = model.get_submodule(f"{block}.router") if _has(model, f"{block}.router") else nn.Module()
    return dict(mine.named_parameters()) | dict(mine.named_buffers())


def _share(router: Router, tensors: Mapping[str, Tensor]) -> None:
    """Let the router hold these tensors themselves."""
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        holder = router.get_submodule(owner)
        held: dict[str, Any] = holder._parameters if isinstance(value, nn.Parameter) else holder._buffers
        held[leaf] = value


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


class _WithValues(nn.Module):
    """A router that returns what it would hand to an observer, too; its names are put into ``names``."""

    def __init__(self, router: Router, names: list[str]) -> None:
        super().__init__()
        self.router = router
        self.note = names.extend  # a plain attribute would be set back after the trace

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, ...]:
        values: dict[str, Tensor] = {}
        self.router.observer = values.update
        try:
            experts_TK, weights_TK = self.router(x_TD, token_ids_T)
        finally:
            self.router.observer = None
        self.note(values)
        return experts_TK, weights_TK, *values.values()


@functools.lru_cache(maxsize=16)
def _traced(
    spec: RouterSpec, d_model: int, num_experts: int, top_k: int, dtype: torch.dtype, vocabulary: int | None
) -> tuple[fx.GraphModule, list[str]]:
    """The graph of a router with its observed values as outputs after the two it has, and their names. The values of
    its parameters are no part of it, so one serves all blocks of a size.
    """
    router = spec.build(d_model, num_experts, top_k, dtype=dtype, vocabulary=vocabulary)
    x = torch.zeros(4, d_model, dtype=dtype)
    args = (x, torch.zeros(4, dtype=torch.int64)) if spec.needs_token_ids else (x,)
    names: list[str] = []
    return trace(_WithValues(router, names), args, dynamic=range(len(args))), names


@dataclass
class _Values:
    """The observed values of one call as nodes of the graph: found where it has them, added where not."""

    model: fx.GraphModule
    call: _Call
    there: dict[fx.Node, Any] = field(default_factory=dict)  # node of the trace -> node of the graph, or a size

    def nodes(self, spec: RouterSpec, router: Router) -> dict[str, fx.Node]:
        """By name."""
        given = self.call.x.meta["val"]
        vocabulary = len(router.get_buffer("table")) if spec.needs_token_ids else None
        module, names = _traced(spec, given.shape[1], router.num_experts, router.top_k, given.dtype, vocabulary)
        traced = module.graph
        returned: Any = traced.output_node().args[0]
        experts, weights, *values = returned
        self.there[next(iter(traced.nodes))] = self.call.x
        self._match(experts, _unfilled(self.call.experts, experts))
        self._match(weights, self.call.weights)
        with self.model.graph.inserting_before(self.call.node):
            return dict(zip(names, (self._node(value) for value in values), strict=True))

    def _match(self, traced: fx.Node, here: Any) -> None:
        """Note what stands for ``traced`` and for all that it reads."""
        if traced in self.there:
            return
        self.there[traced] = here
        if traced.op == "placeholder" or isinstance(traced.meta["val"], torch.SymInt):
            return  # token ids; a size may be read off another tensor
        same = isinstance(here, fx.Node) and here.op == traced.op
        if same and traced.op == "get_attr":
            same = here.target == self._name(traced)
        elif same:
            same = here.target == traced.target
        if not same:
            raise Refused(
                f"the graph computes {here} where the router has {traced.target}", where=self.call.block,
                hint="observe the program before its experts are placed or sharded",
            )  # fmt: skip
        leaves = torch.utils._pytree.tree_leaves
        for mine, its in zip(leaves((traced.args, traced.kwargs)), leaves((here.args, here.kwargs))):
            if isinstance(mine, fx.Node):
                self._match(mine, its)

    def _node(self, traced: fx.Node) -> Any:
        """What stands for a node of the trace, added with what it reads where there is nothing yet."""
        if traced not in self.there:
            graph = self.model.graph
            if traced.op == "get_attr":
                new = graph.get_attr(self._name(traced))
            else:
                args, kwargs = fx.map_arg((traced.args, traced.kwargs), self._node)
                new = graph.call_function(traced.target, args, kwargs)  # type: ignore[arg-type]
            self.there[traced] = new
        return self.there[traced]

    def _name(self, traced: fx.Node) -> str:
        return f"{self.call.block}.{traced.target}"
