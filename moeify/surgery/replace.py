"""The rewrite of module form: the blocks of a model become mixtures, the rest of the model stays as it is."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeify.errors import UsageError
from moeify.experts import METHODS
from moeify.experts.base import ExpertPlan
from moeify.ir.block import Block
from moeify.ir.recipe import BlockRecipe
from moeify.ir.weights import WeightRecipe, generator_for
from moeify.nn.routers import ROUTERS
from moeify.surgery import places
from moeify.surgery.conversion import ATTRIBUTE, Conversion
from moeify.surgery.fast_path import disable_fast_path
from moeify.surgery.layers import Enter, Owned, Placed
from moeify.surgery.places import CarrierPlace, OwnedPlace, Place
from moeify.surgery.region import Region, has_tensor, keep, reads, tensor_at
from moeify.surgery.slot import Leave, Skip, Slot
from moeify.surgery.token_ids import TokenIds, tap

Known = Callable[[str], torch.Tensor | None]
Planner = Callable[[Block], ExpertPlan]


def rewrite(model: nn.Module, conversion: Conversion, known: Known | None, plan: Planner | None = None) -> None:
    """Put the mixtures in.

    ``known`` gives values by name that are computed already; those it does not have come from the dense weights.
    With None instead of ``known`` the new parameters stay on the meta device and nothing dense is read. ``plan``
    gives the plan of a block where there is one; without it names and shapes are planned from the recipe alone.
    """
    if hasattr(model, ATTRIBUTE):
        raise UsageError(f"this {type(model).__name__} has been converted already", hint="convert the dense model")
    jobs = [_Job(model, block, conversion, plan) for block in conversion.blocks]
    holders = {path: tap(model, path) for path in sorted(set(conversion.token_ids_of.values()))}
    left = Counter(name for job in jobs for name in job.sources())
    kept: dict[str, torch.Tensor] = {}
    while jobs:
        job = jobs.pop(0)  # a job holds the dense modules of its block
        # A weight that two blocks read must outlive the first.
        for name in job.sources():
            left[name] -= 1
            if name not in kept:
                kept[name] = tensor_at(model, name)
        job.put(holders, kept, known)
        kept = {name: tensor for name, tensor in kept.items() if left[name]}
    disable_fast_path(model)
    object.__setattr__(model, ATTRIBUTE, conversion)


@dataclass
class _Job:
    """One block: its place, recipe and plan, checked before anything is changed."""

    model: nn.Module
    block: Block
    conversion: Conversion
    planner: Planner | None

    def __post_init__(self) -> None:
        block, recipe = self.block, self.conversion.recipe
        self.place: Place = places.find(self.model, block)
        self.recipe: BlockRecipe = recipe.for_block(block.path)
        up = tensor_at(self.model, block.up.parameter)
        self.dtype, self.device, self.requires_grad = up.dtype, up.device, up.requires_grad
        method = METHODS.parse(self.recipe.method)
        self.plan: ExpertPlan = (
            method.plan(block, self.recipe, recipe.seed, up.dtype) if self.planner is None else self.planner(block)
        )
        self.spec = ROUTERS.parse(self.recipe.router).for_block(block)
        self.embedding = self.conversion.token_ids_of.get(block.anchor)

    def sources(self) -> set[str]:
        return {ref.parameter for ref in self.block.weights.values()}

    def put(self, holders: dict[str, TokenIds], dense: dict[str, torch.Tensor], known: Known | None) -> None:
        """Build the layer, fill it, and put it in the place of the block."""
        where = self.place
        layer = self._layer(Owned if isinstance(where, OwnedPlace) else Enter, draw=known is not None)
        if self.embedding is not None:
            layer.token_ids = holders[self.embedding]
        if known is not None:
            self._fill(layer, dense, known)
        for parameter in layer.parameters():
            parameter.requires_grad_(self.requires_grad and parameter.is_floating_point())
        if isinstance(where, OwnedPlace):
            self._put_owned(layer, where.owner)
        else:
            self._put_carrier(layer, where)
        if layer.region is not None:
            layer.region.bind(self.model)

    def _layer(self, kind: type[Placed], draw: bool) -> Any:
        block, plan = self.block, self.plan
        vocabulary = None
        if self.embedding is not None:
            vocabulary = tensor_at(self.model, f"{self.embedding}.weight").shape[0]
        # The router draws on the CPU, as in graph form, and moves.
        with contextlib.nullcontext() if draw else torch.device("meta"):
            router = self.spec.build(
                block.d_model, plan.num_experts, self.recipe.top_k, dtype=self.dtype, vocabulary=vocabulary
            )
        if draw:
            generator = generator_for(self.conversion.recipe.seed, f"{block.anchor}.router")
            router.reset(generator, plan.router_repeat)
            router.to(self.device)
        owned = kind is Owned
        layer = kind(
            block.d_model,
            block.d_out,
            plan.d_expert,
            plan.num_experts,
            router,
            roles=tuple(plan.weights),
            activation=Region(block.region) if block.region is not None else block.activation,
            hidden_dropout=0.0 if block.region is not None else block.hidden_dropout,
            shared=plan.shared["up"].shape[0] if plan.shared else None,
            shared_roles=tuple(plan.shared) or None,
            shared_gate=plan.shared_gate,
            output_bias=plan.output_bias is not None,
            layout=block.layout if owned else "channels-last",  # type: ignore[arg-type]
            device=torch.device("meta"),
            dtype=self.dtype,
        )
        layer.anchor = block.anchor
        return layer

    def _fill(self, layer: Placed, dense: dict[str, torch.Tensor], known: Known) -> None:
        for role in dict(layer.router.named_parameters()):
            # What a program drew or fitted; without it the layer's own draw, which is the same.
            drawn = known(f"{self.block.anchor}.router.{role}")
            if drawn is not None:
                _assign(layer.router, role, drawn)
        starts = self.spec.recipes(self.block, self.plan.units, self.dtype)
        for recipe in (*_recipes(self.block, self.plan), *starts):
            name = recipe.name.removeprefix(f"{self.block.anchor}.")
            value = known(recipe.name)
            _assign(layer, name, recipe.materialise(dense.__getitem__) if value is None else value)

    def _put_owned(self, layer: Owned, owner: nn.Module) -> None:
        block = self.block
        layer.output_dropout = block.output_dropout
        layer.train(owner.training)
        _copy_hooks(owner, layer)
        if block.region is not None:
            inside = [name for name in reads(block.region) if name.startswith(f"{block.owner}.")]
            names = [name.removeprefix(f"{block.owner}.") for name in inside if has_tensor(self.model, name)]
            keep(owner, layer, names, block.path)
        places.put(self.model, owner, layer)

    def _put_carrier(self, layer: Enter, where: CarrierPlace) -> None:
        slot = Slot()
        layer.stand_for(where.first, where.channels, slot)
        layer.train(where.first.training)
        if where.second is not None:
            places.put(self.model, where.second, Skip(where.second, where.channels))
        places.put(self.model, where.down, Leave(where.down, where.channels, slot, self.block.path))
        places.put(self.model, where.first, layer)


def _recipes(block: Block, plan: ExpertPlan) -> Iterable[WeightRecipe]:
    yield from plan.weights.values()
    yield from plan.shared.values()
    if plan.output_bias is not None:
        yield plan.output_bias
    if plan.shared_gate:
        shape = (1, block.d_model)
        yield WeightRecipe(
            f"{block.anchor}.shared_gate.weight",
            shape,
            (block.up,),
            lambda up: up.new_zeros(shape),
            plan.weights["up"].dtype,
        )


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = nn.Parameter(value.detach())


def _copy_hooks(old: nn.Module, new: nn.Module) -> None:
    """A hook of the user's on the submodule goes on firing."""
    for name, value in vars(old).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name:
            vars(new)[name] = value
