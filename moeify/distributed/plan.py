"""A plan: what expert parallelism would cost a model on machines that need not be here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moeify.distributed.block_plan import EXCHANGES, BlockPlan, block_plan, training_bytes
from moeify.distributed.cost import Group
from moeify.distributed.effective import CAVEAT, LAWS, effective_parameters
from moeify.distributed.labels import ASSUMED, GIVEN, MEASURED, Figure, weakest
from moeify.distributed.mixtures import Mixture
from moeify.distributed.network import Machine
from moeify.distributed.placement import split_sizes
from moeify.distributed.setting import Setting
from moeify.errors import Refused

SCALING = tuple(2**n for n in range(3, 13))  # 8 to 4096 ranks


@dataclass(frozen=True)
class Model:
    """What a plan needs of a model: its mixtures, the parameters outside them, and those of the dense model it was."""

    name: str
    mixtures: tuple[Mixture, ...]
    outside_parameters: int
    outside_bytes: int
    dense_parameters: int


@dataclass(frozen=True)
class ScalePoint:
    """All mixtures of the model together on so many ranks, forward and, where trained, backward: simulated routing,
    modelled time. ``efficiency`` is compute over compute and the best exchange, nothing overlapped."""

    ranks: int
    expert_ranks: int
    rows_per_expert: Figure
    imbalance: Figure
    exchange_flat: Figure
    exchange_hierarchical: Figure
    exchange_deduplicated: Figure
    compute: Figure
    efficiency: Figure


@dataclass(frozen=True)
class PlacedBlock:
    """One block whose experts were put elsewhere: the fullest rank over the mean, on the loads that were counted."""

    path: str
    before: Figure
    after: Figure


@dataclass
class Plan:
    """``expert_ranks`` of the ``devices`` share one set of experts. ``placed`` is what was written, if anything."""

    model: str
    devices: int
    per_node: Figure
    expert_ranks: int
    replicas: int
    mode: str
    training: bool
    tokens: Figure
    blocks: list[BlockPlan]
    whole: dict[str, Figure]
    effective: list[dict[str, Any]]
    machine: dict[str, Figure]
    scaling: list[ScalePoint]
    notes: list[str] = field(default_factory=list)
    placed: list[PlacedBlock] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Every number as a figure."""
        numbers = {name: _given(getattr(self, name)) for name in ("devices", "expert_ranks", "replicas")}
        scaling = [
            {**asdict(p), "ranks": _given(p.ranks), "expert_ranks": _given(p.expert_ranks)} for p in self.scaling
        ]
        return {**asdict(self), **numbers, "blocks": [block.to_dict() for block in self.blocks], "scaling": scaling}


def make_plan(
    model: Model,
    setting: Setting,
    machine: Machine | None = None,
    *,
    training: bool = True,
    scaling: Sequence[int] = SCALING,
) -> Plan:
    """The plan of a model. Raises Refused for one without mixtures, and what Setting raises."""
    if not model.mixtures:
        raise Refused(f"{model.name} has no mixture of experts to plan for", hint="give --experts, or convert it first")
    machine = machine or Machine()
    group = setting.group(model.mixtures)
    blocks = _blocks(model, group, setting, machine)
    return Plan(
        model=model.name,
        devices=setting.devices,
        per_node=setting.per_node,
        expert_ranks=group.ranks,
        replicas=setting.devices // group.ranks,
        mode=setting.mode,
        training=training,
        tokens=setting.tokens,
        blocks=blocks,
        whole=_whole(model, blocks, setting, machine, training),
        effective=_effective(model),
        machine={f.name: getattr(machine, f.name) for f in dataclasses.fields(machine)},
        scaling=_scaling(model, scaling, setting, machine, training),
        notes=_notes(model, setting, group, machine, training),
    )


def _given(ranks: int) -> dict[str, Any]:
    """A number of ranks: asked for, or what follows from it."""
    return asdict(Figure(ranks, "ranks", GIVEN))


def _blocks(
    model: Model, group: Group, setting: Setting, machine: Machine, *, alternatives: bool = True
) -> list[BlockPlan]:
    """One for all mixtures that are alike and have the same loads."""
    made: dict[Any, BlockPlan] = {}
    for mixture in model.mixtures:
        loads = setting.loads.get(mixture.anchor)
        key = dataclasses.replace(mixture, path="", anchor=""), tuple(loads) if loads is not None else None
        if key in made:
            made[key].paths.append(mixture.path)
        else:
            made[key] = block_plan(mixture, group, setting, machine, alternatives=alternatives)
    return list(made.values())


def _total(blocks: Sequence[BlockPlan], name: str, training: bool, *, each_call: bool = True) -> Figure:
    """The sum over all blocks, and over all their calls."""
    times = [len(block.paths) * (block.calls if each_call else 1) for block in blocks]
    value = sum(n * block.seconds(name, backward=training) for n, block in zip(times, blocks, strict=True))
    first = blocks[0].forward[name]
    return Figure(value, first.unit, weakest(*(block.forward[name] for block in blocks)))


def _whole(
    model: Model, blocks: Sequence[BlockPlan], setting: Setting, machine: Machine, training: bool
) -> dict[str, Figure]:
    exchanges = {name: _total(blocks, name, training) for name in EXCHANGES}
    compute = _total(blocks, "compute", training)
    best = min(exchanges.values(), key=lambda figure: figure.value)
    parameters = model.outside_parameters + sum(mixture.parameters for mixture in model.mixtures)
    item = setting.item or model.mixtures[0].item
    outside = model.outside_bytes if setting.item is None else model.outside_parameters * setting.item
    weights = Figure(_total(blocks, "weights_per_rank", False, each_call=False).value + outside, "B", GIVEN)
    state = _total(blocks, "training_state_per_rank", False, each_call=False).value
    state += model.outside_parameters * training_bytes(item)
    needed = Figure(state, "B", ASSUMED) if training else weights
    buffers = [block.forward["exchange_buffers_per_rank"].value * block.calls for block in blocks]
    # Training keeps the rows of every call for the backward pass; inference has those of one call at a time.
    alive = sum(n * len(block.paths) for n, block in zip(buffers, blocks, strict=True)) if training else max(buffers)
    room = max(machine.memory.value - needed.value, 0.0)
    most = Figure(int(room / (alive / setting.tokens.value)), "tokens", weakest(machine.memory, needed))
    return {
        "parameters": Figure(parameters, "", MEASURED),
        "weights_per_rank": weights,
        "training_state_per_rank": Figure(state, "B", ASSUMED),
        "memory_per_rank": Figure(machine.memory.value, "B", machine.memory.source),
        **exchanges,
        "compute": compute,
        "exchange_over_compute": Figure(best.value / compute.value, "", weakest(best, compute)),
        "token_budget": max((block.forward["token_budget"] for block in blocks), key=lambda figure: figure.value),
        "tokens_that_fit": most,
    }


def _effective(model: Model) -> list[dict[str, Any]]:
    """By every law, for the mean number of experts, with what must be said beside it."""
    experts = round(sum(mixture.experts for mixture in model.mixtures) / len(model.mixtures))
    return [
        {
            "routing": law.name,
            "experts": Figure(experts, "", MEASURED),
            "dense": Figure(model.dense_parameters, "", MEASURED),
            "effective": Figure(effective_parameters(law, model.dense_parameters, experts), "", ASSUMED),
            "cutoff": Figure(law.cutoff, "", ASSUMED),
            "caveat": CAVEAT,
        }
        for law in LAWS
    ]


def _scaling(
    model: Model, sizes: Sequence[int], setting: Setting, machine: Machine, training: bool
) -> list[ScalePoint]:
    """Groups of one size cost the same however many of them there are."""
    points: dict[Group, ScalePoint] = {}
    found = []
    for ranks in sizes:
        here = dataclasses.replace(setting, devices=ranks, expert_ranks=None)
        group = here.group(model.mixtures)
        if group not in points:
            points[group] = _point(model, group, here, machine, training)
        found.append(dataclasses.replace(points[group], ranks=ranks))
    return found


def _point(model: Model, group: Group, setting: Setting, machine: Machine, training: bool) -> ScalePoint:
    blocks = _blocks(model, group, setting, machine, alternatives=False)
    exchanges = {name: _total(blocks, name, training) for name in EXCHANGES}
    compute = _total(blocks, "compute", training)
    best = min(exchanges.values(), key=lambda figure: figure.value)
    fullest = max(blocks, key=lambda block: block.forward["imbalance"].value)
    return ScalePoint(
        setting.devices,
        group.ranks,
        fullest.forward["rows_per_expert"],
        fullest.forward["imbalance"],
        **exchanges,
        compute=compute,
        efficiency=Figure(compute.value / (compute.value + best.value), "", weakest(compute, best)),
    )


def _notes(model: Model, setting: Setting, group: Group, machine: Machine, training: bool) -> list[str]:
    notes = ["shard-experts inserts the flat exchange; the other two are what it could be"]
    item = setting.item or model.mixtures[0].item
    if item > 2 and machine.peak.source == ASSUMED:
        notes.append(f"the peak is assumed for bfloat16 and an element here has {item} bytes: --dtype, or --peak")
    if setting.devices > group.ranks:
        notes.append(
            f"{group.ranks} ranks share one set of experts and {setting.devices // group.ranks} such groups are "
            "replicas; "
            + ("the all-reduce of their gradients is not in these times" if training else "nothing passes between them")
        )
    if not setting.loads and setting.skew.value:
        notes.append("skewed experts are numbered from the hottest down, so that without --placed the hottest meet")
    for experts in sorted({mixture.experts for mixture in model.mixtures}):
        idle = split_sizes(experts, group.ranks).count(0)
        if idle:
            notes.append(f"{idle} of {group.ranks} ranks hold none of {experts} experts")
    return notes
