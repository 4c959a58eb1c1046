"""How a model is to run: ranks, nodes, tokens, mode; and which ranks share a set of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeify.distributed import routing
from moeify.distributed.cost import Group
from moeify.distributed.labels import GIVEN, Figure
from moeify.distributed.mixtures import Mixture
from moeify.distributed.placement import split_sizes
from moeify.distributed.routing import Shares
from moeify.errors import BadOption, NotDivisible
from moeify.ir.sharding import MODES


@dataclass(frozen=True)
class Setting:
    """``tokens`` are those of one rank in one step. ``expert_ranks`` share one set of experts, None: as many of the
    devices as can without leaving one of them without experts; the others are replicas. ``loads`` are rows of each
    expert by anchor, and ``skew`` the Zipf exponent where there are none. ``capacity_factor`` counts in mode capacity.
    ``item`` is the bytes of an element, None: the model's.
    """

    devices: int
    per_node: Figure = field(default=Figure(8, "ranks"))
    tokens: Figure = field(default=Figure(4096, "tokens"))
    expert_ranks: int | None = None
    mode: str = "dropless"
    capacity_factor: Figure = field(default=Figure(1.25))
    skew: Figure = field(default=Figure(0.0))
    loads: Mapping[str, Sequence[float]] = field(default_factory=dict)
    loads_source: str = GIVEN
    placed: bool = False  # whether experts stand as place-experts puts them
    extra: int = 1  # places on each rank for copies of hot experts
    item: int | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "per_node", "tokens", "expert_ranks", "extra"):
            value = getattr(self, name)
            number = value.value if isinstance(value, Figure) else value
            least = 0 if name == "extra" else 1
            if number is not None and (number < least or number != int(number)):
                kind = f"a whole number of at least {least}"
                raise BadOption(f"{name.replace('_', '-')} is {number:g}: it must be {kind}")
        if self.mode not in MODES:
            raise BadOption(f"there is no mode {self.mode!r}", hint=f"choose one of {', '.join(MODES)}")
        for name in ("capacity_factor", "skew"):
            number = getattr(self, name).value
            if not 0 <= number < float("inf") or (name == "capacity_factor" and not number):
                kind = "a number of at least 0" if name == "skew" else "a finite positive number"
                raise BadOption(f"{name.replace('_', '-')} is {number:g}: it must be {kind}")
        if self.devices > self.per_node.value and self.devices % self.per_node.value:
            raise BadOption(
                f"{self.devices} devices do not fill nodes of {self.per_node.value:g}",
                hint="say how many stand in a node: --per-node N",
            )

    @property
    def factor(self) -> float:
        """Rows sent over rows there are."""
        return self.capacity_factor.value if self.mode == "capacity" else 1.0

    def shares(self, mixture: Mixture) -> tuple[Shares, str]:
        """The shares of the experts, and where they come from. Raises BadOption for loads of another model."""
        loads = self.loads.get(mixture.anchor)
        if loads is None:
            if self.loads:
                raise BadOption(f"the loads say nothing of {mixture.anchor}")
            return routing.zipf(mixture.experts, self.skew.value, mixture.top_k), self.skew.source
        if len(loads) != mixture.experts:
            raise BadOption(f"the loads of {mixture.anchor} are {len(loads)}, and it has {mixture.experts} experts")
        return routing.shares_of(loads, mixture.top_k), self.loads_source

    def group(self, found: Sequence[Mixture]) -> Group:
        """The ranks that share one set of experts. Raises BadOption or NotDivisible where ``expert_ranks`` do not
        fit, with those that do."""
        per_node = int(self.per_node.value)
        apart = [n for n in range(1, self.devices + 1) if self.devices % n == 0 and _keeps_nodes(n, per_node)]
        if self.expert_ranks is None:
            fits = [
                n for n in apart if all(self._divides(n, one) and min(split_sizes(one.experts, n)) for one in found)
            ]
            return Group(max(fits), per_node)
        if self.expert_ranks not in apart:
            raise BadOption(
                f"{self.expert_ranks} ranks for the experts do not fit {self.devices} devices, {per_node} to a node",
                hint=f"choose one of {', '.join(map(str, apart))}",
            )
        for mixture in found:
            if not self._divides(self.expert_ranks, mixture):
                fits = [n for n in apart if mixture.experts % n == 0]
                raise NotDivisible(
                    f"{mixture.experts} experts do not split evenly over {self.expert_ranks} ranks, as mode capacity "
                    "needs",
                    where=mixture.path,
                    hint=f"choose one of {', '.join(map(str, fits))}, or mode dropless",
                )
        return Group(self.expert_ranks, per_node)

    def _divides(self, ranks: int, mixture: Mixture) -> bool:
        return self.mode == "dropless" or mixture.experts % ranks == 0


def _keeps_nodes(ranks: int, per_node: int) -> bool:
    """Whether groups of so many neighbouring ranks are whole nodes, or whole parts of one."""
    return ranks % per_node == 0 if ranks > per_node else per_node % ranks == 0


def given(value: float | None, default: Figure) -> Figure:
    """The caller's number, or the default."""
    return default if value is None else Figure(value, default.unit, GIVEN)
