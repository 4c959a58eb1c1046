"""The mixtures of a model by the names that people know, and the losses that its recipe gives each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from moeify.ir.recipe import Recipe
from moeify.ir.report import Report
from moeify.nn.losses import LOSSES
from moeify.nn.losses.base import RouterLoss
from moeify.nn.moe import MoE
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.router import Router
from moeify.surgery.conversion import ATTRIBUTE, REPORT, Conversion

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@dataclass(frozen=True)
class BlockFacts:
    """``path`` is the block's module path, and of a mixture that no conversion has made, its own. ``updates`` says
    whether its router changes something after a step.
    """

    path: str
    losses: tuple[RouterLoss, ...]
    updates: bool


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod  # type: ignore[assignment]
    return model


def facts_of(model: nn.Module) -> dict[str, BlockFacts]:
    """By the name that an Observation has for the block, in the order of the model; empty without mixtures."""
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, MoE)}
    if not mixtures:
        return _of_graph(model) if isinstance(model, fx.GraphModule) else {}
    found = {path: BlockFacts(path, (), updates(mixture.router)) for path, mixture in mixtures.items()}
    for prefix, part in model.named_modules():
        conversion = getattr(part, ATTRIBUTE, None)
        if isinstance(conversion, Conversion):
            paths = {block.anchor: block.path for block in conversion.blocks}
            for path, mixture in mixtures.items():
                if path.startswith(f"{prefix}." if prefix else "") and getattr(mixture, "anchor", None) in paths:
                    block = paths[mixture.anchor]  # type: ignore[index]
                    whole = ".".join(filter(None, (prefix, block)))
                    mine = parsed(conversion.recipe.for_block(block).router_losses)
                    found[path] = BlockFacts(whole, mine, updates(mixture.router))
    return found


def parsed(given: Sequence[str | RouterLoss]) -> tuple[RouterLoss, ...]:
    """Raises UnknownName or BadOption."""
    return tuple(LOSSES.parse(one) if isinstance(one, str) else one for one in given)


def updates(router: Router) -> bool:
    """Whether it changes something after a step."""
    return type(router).after_step is not Router.after_step


def _of_graph(model: fx.GraphModule) -> dict[str, BlockFacts]:
    report = getattr(model, REPORT, None)
    if not isinstance(report, Report):
        return {}
    recipe = Recipe.from_dict(report.recipe)
    found = {}
    for entry in report.blocks:
        if entry.converted and entry.router is not None:
            spec = ROUTERS.parse(entry.router)
            with torch.device("meta"):
                router = spec.build(entry.d_model, entry.experts, entry.top_k, dtype=torch.float32, vocabulary=1)
            losses = parsed(recipe.for_block(entry.path).router_losses)
            found[entry.anchor] = BlockFacts(entry.path, losses, updates(router))
    return found
