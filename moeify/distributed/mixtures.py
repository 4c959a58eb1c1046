"""What a plan has to know of each mixture of a program: sizes, read off the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moeify.backends.calls import find_calls
from moeify.ir.program import Program

_MATRICES = ("up", "gate", "down")
_LOCAL = ("shared", "router.", "output_bias")  # every token goes through these, on its own rank


@dataclass(frozen=True)
class Mixture:
    """One block. ``expert_weights`` are the elements of one expert's matrices, ``matrices`` how many they are (2, or 3
    when gated), ``expert_parameters`` all of one expert; ``shared_*`` and ``router_*`` are what every token goes
    through. ``calls`` is how often the model runs it. ``item`` is the bytes of an element.
    """

    path: str
    anchor: str
    calls: int
    d_model: int
    d_out: int
    d_expert: int
    experts: int
    top_k: int
    matrices: int
    expert_weights: int
    expert_parameters: int
    local_weights: int  # elements of the shared experts' and the router's matrices
    local_parameters: int
    item: int

    @property
    def parameters(self) -> int:
        return self.experts * self.expert_parameters + self.local_parameters

    @property
    def flops_per_token(self) -> int:
        """Forward: multiply-adds of the matrices a token goes through, counted as two."""
        return 2 * (self.top_k * self.expert_weights + self.local_weights)

    @property
    def backward_flops_per_token(self) -> int:
        """Of m matrices: m products for the rows' gradients, m for the weights', m - 1 computed again.

        ``moe.experts`` saves no hidden value.
        """
        again = self.expert_weights * (self.matrices - 1) // self.matrices
        return 2 * (self.top_k * (2 * self.expert_weights + again) + 2 * self.local_weights)


def mixtures(program: Program, paths: Mapping[str, str] | None = None) -> list[Mixture]:
    """Every mixture in the order of its first call. ``paths`` gives the module path of an anchor, for people.

    Parameters may be on the meta device: nothing but shapes is read.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    sizes = dict(program.graph_module.named_parameters(remove_duplicate=False))
    calls: dict[str, list[int]] = {}
    for call in find_calls(program.graph):
        calls.setdefault(call.block, []).append(int(nodes[call.experts].meta["val"].shape[1]))
    return [_mixture(anchor, (paths or {}).get(anchor, anchor), ks, sizes) for anchor, ks in calls.items()]


def parameters_outside(program: Program, found: list[Mixture]) -> tuple[int, int]:
    """(elements, bytes) of the parameters that belong to no mixture, tied ones once."""
    prefixes = tuple(f"{one.anchor}.{part}" for one in found for part in ("experts.", *_LOCAL))
    read = {node.target for node in program.graph.find_nodes(op="get_attr")}
    named = program.graph_module.named_parameters(remove_duplicate=False)
    seen = {id(p): p for name, p in named if name in read and not name.startswith(prefixes)}
    return sum(p.numel() for p in seen.values()), sum(p.numel() * p.element_size() for p in seen.values())


def _mixture(anchor: str, path: str, top_ks: list[int], sizes: Mapping[str, torch.Tensor]) -> Mixture:
    stacked = {
        name.removeprefix(f"{anchor}.experts."): p for name, p in sizes.items() if name.startswith(f"{anchor}.experts.")
    }
    local = {name: p for name, p in sizes.items() if name.startswith(tuple(f"{anchor}.{part}" for part in _LOCAL))}
    up, down = stacked["up"], stacked["down"]
    matrices = [p for role, p in stacked.items() if role in _MATRICES]
    return Mixture(
        path=path,
        anchor=anchor,
        calls=len(top_ks),
        d_model=up.shape[2],
        d_out=down.shape[1],
        d_expert=up.shape[1],
        experts=up.shape[0],
        top_k=top_ks[0],
        matrices=len(matrices),
        expert_weights=sum(p.numel() // up.shape[0] for p in matrices),
        expert_parameters=sum(p.numel() // up.shape[0] for p in stacked.values()),
        local_weights=sum(p.numel() for name, p in local.items() if p.dim() > 1),
        local_parameters=sum(p.numel() for p in local.values()),
        item=up.element_size(),
    )
