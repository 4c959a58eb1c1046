"""Several batches through one program side by side, so that what comes later can be fitted to what came before."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir.metadata import tag
from moeify.verify.measure import widened

_moe = torch.ops.moeify
_Env = dict[fx.Node, Any]


class Lockstep(fx.Interpreter):
    """All batches stand at one node of the graph; ``run_to`` takes each of them to a later one.

    A weight that changes while they stand is read changed by whatever comes after. Memory holds, for every token of
    all batches, the values that are still to be read where they stand (between two blocks of a transformer little
    more than the residual stream, 4 D bytes a token), and the inner values of one batch at a time.
    """

    def __init__(self, module: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]], experts: Mapping[str, int]):
        """``experts`` gives the number of experts of each split block by anchor."""
        super().__init__(module)
        self._nodes = list(module.graph.nodes)
        self._place = {node: position for position, node in enumerate(self._nodes)}
        self._at = 0  # the first node that has not run
        holders = module.graph.find_nodes(op="placeholder")
        self._envs: list[_Env] = [dict(zip(holders, widened(batch))) for batch in batches]
        self._experts = experts
        self._all_on: Collection[str] = ()

    def run_to(self, stop: fx.Node) -> list[Tensor]:
        """The value of ``stop`` for each batch, when it has run. Batches that have gone past it have it no longer."""
        found = []
        for env in self._envs:
            self._run(env, self._at, self._place[stop] + 1)
            found.append(env[stop])
        self._at = max(self._at, self._place[stop] + 1)
        return found

    def look_ahead(self, nodes: Sequence[fx.Node], all_on: Collection[str]) -> list[list[Tensor]]:
        """The values of later nodes, a list of those of all batches for each, with every expert of the blocks
        ``all_on`` on. The batches stay where they are.
        """
        self._all_on = all_on
        found: list[list[Tensor]] = [[] for _ in nodes]
        for env in self._envs:
            twin, at = dict(env), self._at
            for values, node in zip(found, nodes):
                end = max(at, self._place[node] + 1)
                self._run(twin, at, end)
                values.append(twin[node])
                at = end
        self._all_on = ()
        return found

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        mark = tag(n)
        if mark is not None and mark.block in self._all_on:
            args = _with_all_on(n, args, self._experts[mark.block])
        return args, kwargs

    def _run(self, env: _Env, start: int, end: int) -> None:
        self.env = env
        for node in self._nodes[start:end]:
            if node.op != "placeholder":
                env[node] = self.run_node(node)
            for read in self.user_to_last_uses.get(node, []):
                del env[read]


def _with_all_on(node: fx.Node, args: Any, experts: int) -> Any:
    """The arguments of a node that reads the chosen experts or their weights, with all experts and weights of 1."""
    if node.target in (_moe.dispatch_ffn.default, _moe.permute.default):
        every = torch.arange(experts, device=args[0].device).expand(len(args[0]), experts)
        args = (args[0], every, *args[2:])
    if node.target in (_moe.dispatch_ffn.default, _moe.unpermute.default):
        args = (*args[:2], args[2].new_ones(len(args[2]), experts), *args[3:])
    return args
