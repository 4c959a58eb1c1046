"""The calls of routers in the last forward pass of training, kept on the model for losses and updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeify.errors import UsageError
from moeify.nn.losses.base import RouterLoss
from moeify.nn.observation import attach
from moeify.nn.observed import Observation
from moeify.training.blocks import BlockFacts, facts_of, unwrapped

ATTRIBUTE = "moeify_watch"
Masks = Tensor | Mapping[str, Tensor] | None


class Watch:
    """Keeps what routers hand out in training mode with gradients on, of the last forward pass alone.

    A copy or a pickle of it is empty. ``facts`` are those of the blocks, ``factors`` are the coefficients that losses
    have adapted, by their text. ``mask`` is what ``losses`` was given for this forward, ``asked`` the losses it gave of
    each block. ``listeners`` hear of every call, in evaluation too.
    """

    def __init__(self, facts: dict[str, BlockFacts]) -> None:
        self.facts = facts
        self.calls: list[Observation] = []
        self.mask: Masks = None
        self.asked: dict[str, tuple[RouterLoss, ...]] = {}
        self.factors: dict[str, float] = {}
        self.listeners: list[Callable[[Observation], None]] = []
        self._read = False

    def keep(self, call: Observation) -> None:
        if recomputing():
            return
        for listener in self.listeners:
            listener(call)
        if not call.training or not torch.is_grad_enabled():
            return
        if self._read:  # a loop that calls parts of the model never comes by ``begin``
            self._clear()
        self.calls.append(call)

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the whole model."""
        if model.training and torch.is_grad_enabled() and not recomputing():
            self._clear()

    def read(self) -> list[Observation]:
        """The calls of the last forward; the next call that is kept begins anew. Raises UsageError without any."""
        if not self.calls:
            raise UsageError(
                "no router has run since this model is observed, in training mode and with gradients",
                hint="call model.train() and the model first; checkpoint its layers with use_reentrant=False",
            )
        self._read = True
        return self.calls

    def _clear(self) -> None:
        self.calls, self.mask, self.asked, self._read = [], None, {}, False

    def __getstate__(self) -> dict[str, Any]:
        made = Watch(self.facts)
        made.factors = dict(self.factors)
        return vars(made)


def recomputing() -> bool:
    """Whether this is a part of a backward pass, in which activation checkpointing runs layers again. As
    torch.utils.checkpoint tells it.
    """
    return torch._C._current_graph_task_id() != -1


def observe(model: nn.Module) -> None:
    """Let the routers of a converted model hand their values to ``losses`` and ``after_step``, from now on.

    ``convert`` and ``load`` have done it for a model whose recipe names router losses or whose routers have updates.
    Values are kept in training mode and with gradients on, and of the last forward pass alone. Doing it twice changes
    nothing. Raises UsageError for a model without mixtures, Refused for a graph whose routers cannot be told any more.
    """
    model = unwrapped(model)
    if find(model) is None:
        watch = Watch(facts_of(model))
        attach(model, watch.keep)
        model.register_forward_pre_hook(watch.begin)
        object.__setattr__(model, ATTRIBUTE, watch)


def observe_if_asked(model: nn.Module) -> None:
    """``observe`` where the recipe names losses, or a router has an update."""
    if any(facts.losses or facts.updates for facts in facts_of(model).values()):
        observe(model)


def find(model: nn.Module) -> Watch | None:
    """The watch of a model or, where it holds a converted one, of that."""
    for module in model.modules():
        watch = getattr(module, ATTRIBUTE, None)
        if isinstance(watch, Watch):
            return watch
    return None


def watch_of(model: nn.Module) -> Watch:
    """Raises UsageError for a model that is not observed."""
    watch = find(model)
    if watch is None:
        if not facts_of(model):
            raise UsageError("the model has no routers", hint="give what moeify.convert or moeify.load returned")
        raise UsageError(
            "the routers of this model are not observed",
            hint="call moeify.observe(model) before the forward pass, or convert with router_losses",
        )
    return watch


def merged(calls: Sequence[Mapping[str, Tensor]], mask: Tensor | None, path: str) -> dict[str, Tensor]:
    """The values of all calls of one block as those of one, without the tokens that the mask leaves out.

    The experts are the same and so are the scores, so that cutting a batch into several calls changes nothing. Raises
    UsageError for a mask of another number of tokens.
    """
    parts = []
    for call in calls:
        values = dict(call)
        if mask is not None:
            tokens = len(values["experts"])
            if mask.numel() not in (1, tokens):
                raise UsageError(
                    f"the mask is of {mask.numel()} tokens, and the block's router saw {tokens}",
                    where=path,
                    hint="give {path of a block: its mask}; blocks without one count all their tokens",
                )
            on = (mask != 0).flatten().expand(tokens).to(values["experts"].device)
            values = {name: value[on] for name, value in values.items()}
        parts.append(values)
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
