"""The figures of one mixture on one group of ranks."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

from moeify.distributed import cost, routing
from moeify.distributed.cost import Group
from moeify.distributed.labels import ASSUMED, GIVEN, MEASURED, Figure, weakest
from moeify.distributed.mixtures import Mixture
from moeify.distributed.network import Machine
from moeify.distributed.placement import Placement, in_order, place, with_copies
from moeify.distributed.setting import Setting

EXCHANGES = ("exchange_flat", "exchange_hierarchical", "exchange_deduplicated")
ORDER = (
    "parameters", "active_parameters", "flops_per_token", "weights_per_rank", "training_state_per_rank",
    "exchange_buffers_per_rank", "rows_per_expert", "bytes_per_token", *EXCHANGES, "compute", "exchange_over_compute",
    "imbalance", "imbalance_placed", "imbalance_with_copies", "drop_share", "token_budget",
)  # fmt: skip
SIZES = ("calls", "d_model", "d_expert", "experts", "top_k")  # read off the model
_WEIGHT_PASSES_BACKWARD = 3  # read for the preactivations again and for the rows' gradients; their own are written


@dataclass
class BlockPlan:
    """Blocks that are alike. ``forward`` holds every figure by name, of one block and one call of it; ``backward``
    those that the backward pass has too."""

    paths: list[str]
    calls: int
    d_model: int
    d_expert: int
    experts: int
    top_k: int
    forward: dict[str, Figure]
    backward: dict[str, Figure]

    def best(self) -> str:
        """The exchange that takes least in forward."""
        return min(EXCHANGES, key=lambda name: self.forward[name].value)

    def seconds(self, name: str, *, backward: bool) -> float:
        return self.forward[name].value + (self.backward[name].value if backward else 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Every number as a figure."""
        sizes = {name: asdict(Figure(getattr(self, name), "", MEASURED)) for name in SIZES}
        return {**asdict(self), **sizes, "best_exchange": self.best()}


def block_plan(
    mixture: Mixture, group: Group, setting: Setting, machine: Machine, *, alternatives: bool = True
) -> BlockPlan:
    """All figures of one block. Times are those of the fullest rank: its rows are the mean times the imbalance.

    Without ``alternatives`` the imbalances that other placements would have are left out.
    """
    shares, load_source = setting.shares(mixture)
    W, E, K, T = group.ranks, mixture.experts, mixture.top_k, int(setting.tokens.value)
    item = setting.item or mixture.item

    @functools.cache
    def placed() -> Placement:
        return place(shares, W)

    @functools.cache
    def balance(placement: Placement) -> float:
        # In mode capacity every rank computes over buffers of one size.
        return 1.0 if setting.mode == "capacity" else routing.imbalance(shares, placement, T * W, K)

    here = placed() if setting.placed else in_order(E, W)
    imbalance = balance(here)
    rows = T * K * setting.factor * imbalance
    held = max(len(experts) for experts in here.experts)
    load = weakest(setting.tokens, load_source, *([setting.capacity_factor] if setting.mode == "capacity" else []))
    weights_here = held * mixture.expert_parameters + mixture.local_parameters
    work = _Work(mixture, group, rows, T, item, held)
    links = weakest(machine.links_source(group.nodes), load, setting.per_node)
    compute = weakest(machine.compute_source(), load)
    width = mixture.d_model + mixture.d_out
    per_token = cost.leaving(K * width * item * setting.factor, W)
    forward = {
        "parameters": Figure(mixture.parameters, "", MEASURED),
        "active_parameters": Figure(K * mixture.expert_parameters + mixture.local_parameters, "", MEASURED),
        "flops_per_token": Figure(mixture.flops_per_token, "FLOP", MEASURED),
        "weights_per_rank": Figure(weights_here * item, "B", GIVEN),
        "training_state_per_rank": Figure(weights_here * training_bytes(item), "B", ASSUMED),
        "exchange_buffers_per_rank": Figure((T * K * setting.factor + rows) * width * item, "B", load),
        "rows_per_expert": Figure(T * K * setting.factor * W / E, "rows", load),
        "bytes_per_token": Figure(per_token, "B", weakest(GIVEN, *_factor(setting))),
        **dict(zip(EXCHANGES, work.exchanges(machine, counted=setting.mode == "dropless", source=links))),
        "compute": Figure(work.forward(machine), "s", compute),
        "imbalance": Figure(imbalance, "", load),
        "drop_share": _drop_share(shares, setting, K, load),
        "token_budget": _budget(mixture, group, item, machine),
    }
    if alternatives:
        forward["imbalance_placed"] = Figure(balance(placed()), "", load)
        forward["imbalance_with_copies"] = Figure(balance(with_copies(shares, W, setting.extra)), "", load)
    backward = {
        "flops_per_token": Figure(mixture.backward_flops_per_token, "FLOP", MEASURED),
        "bytes_per_token": forward["bytes_per_token"],
        **dict(zip(EXCHANGES, work.exchanges(machine, counted=False, source=links))),
        "compute": Figure(work.backward(machine), "s", compute),
    }
    for side in (forward, backward):
        best = min((side[name] for name in EXCHANGES), key=lambda figure: figure.value)
        side["exchange_over_compute"] = Figure(best.value / side["compute"].value, "", weakest(links, compute))
    ordered = {name: forward[name] for name in ORDER if name in forward}
    return BlockPlan([mixture.path], mixture.calls, mixture.d_model, mixture.d_expert, E, K, ordered, backward)


def training_bytes(item: int) -> int:
    """Bytes of a parameter that AdamW trains: weight, gradient, two moments in float32, and a float32 copy of a weight
    that is narrower."""
    return 2 * item + 8 + (4 if item < 4 else 0)


def _factor(setting: Setting) -> list[Figure]:
    return [setting.capacity_factor] if setting.mode == "capacity" else []


def _drop_share(shares: routing.Shares, setting: Setting, top_k: int, load: str) -> Figure:
    if setting.mode == "dropless":
        return Figure(0.0, "", GIVEN)
    return Figure(routing.drop_share(shares, int(setting.tokens.value), top_k, setting.factor), "", load)


@dataclass(frozen=True)
class _Work:
    """What the fullest rank does in one call: ``rows`` of its experts, of which it holds ``held``, and ``tokens``."""

    mixture: Mixture
    group: Group
    rows: float
    tokens: int
    item: int
    held: int

    def exchanges(self, machine: Machine, *, counted: bool, source: str) -> list[Figure]:
        """Dispatch and combine (and the counts before them): flat, hierarchical, deduplicated."""
        E, W, g = self.mixture.experts, self.group.ranks, self.group.in_node
        sizes = [len(experts) for experts in in_order(E, W).experts]
        per_node = [sum(sizes[first : first + g]) for first in range(0, W, g)]
        dedup = cost.dedup_share(per_node, self.mixture.top_k)
        ways = (
            lambda n: cost.flat_seconds(n, self.group, machine.intra, machine.inter),
            lambda n: cost.hierarchical_seconds(n, self.group, machine.intra, machine.inter),
            lambda n: cost.hierarchical_seconds(n, self.group, machine.intra, machine.inter, dedup),
        )
        payloads = [self.rows * width * self.item for width in (self.mixture.d_model, self.mixture.d_out)]
        counts = ways[0](float(cost.COUNT_BYTES * E)) if counted else 0.0
        return [Figure(sum(map(way, payloads)) + counts, "s", source) for way in ways]

    def forward(self, machine: Machine) -> float:
        one = self.mixture
        flops = 2.0 * (self.rows * one.expert_weights + self.tokens * one.local_weights)
        return cost.compute_seconds(flops, self._weight_bytes(), machine.peak.value, machine.memory_bandwidth.value)

    def backward(self, machine: Machine) -> float:
        one = self.mixture
        again = one.expert_weights * (one.matrices - 1) / one.matrices
        flops = 2.0 * (self.rows * (2 * one.expert_weights + again) + 2 * self.tokens * one.local_weights)
        size = _WEIGHT_PASSES_BACKWARD * self._weight_bytes()
        return cost.compute_seconds(flops, size, machine.peak.value, machine.memory_bandwidth.value)

    def _weight_bytes(self) -> float:
        one = self.mixture
        touched = cost.touched_experts(self.held, one.top_k, one.experts, self.tokens * self.group.ranks)
        return (touched * one.expert_parameters + one.local_parameters) * self.item


def _budget(mixture: Mixture, group: Group, item: int, machine: Machine) -> Figure:
    """Tokens of a rank from which neither reading the weights nor sending messages is what takes the time."""
    rows = cost.compute_bound_rows(item, machine.peak.value, machine.memory_bandwidth.value)
    compute = rows * mixture.experts / (mixture.top_k * group.ranks)
    link = machine.inter if group.nodes > 1 else machine.intra
    row_bytes = mixture.top_k * mixture.d_model * item
    exchange = cost.bandwidth_bound_tokens(row_bytes, group.ranks, link) if group.ranks > 1 else 0.0
    source = weakest(machine.compute_source(), machine.links_source(group.nodes))
    return Figure(math.ceil(max(compute, exchange)), "tokens", source)
