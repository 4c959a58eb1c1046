"""What routers saw and chose, kept with its autograd graph: the ground that losses and balancing stand on.

    with observing(model) as seen:
        output = model(**batch)
        loss = output.loss + sum(balance(call.values["logits"]) for call in seen.calls)
        loss.backward(); optimiser.step()
        for call in seen.calls:
            call.router.after_step(call.values)
        seen.calls.clear()

Both forms of a converted model are taken: in module form the routers are there, for a graph see ``observation_graph``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from moeify.errors import UsageError
from moeify.nn.moe import MoE
from moeify.nn.observation_graph import attach_graph
from moeify.nn.observed import NOTHING, WHAT, Keep, Observation
from moeify.nn.routers.router import Router


@dataclass
class Observations:
    """The calls since observing began, or since they were cleared, in the order in which they ran."""

    calls: list[Observation] = field(default_factory=list)


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[Observations]:
    """Keep what every router of a converted model hands out, until the end of the block; in training and evaluation.

    Values of calls that nobody clears stay in memory, autograd graphs included. A model must not be saved, copied or
    exported meanwhile. Under activation checkpointing a router runs again in the backward pass, and is kept again.

    Raises what ``attach`` raises.
    """
    seen = Observations()
    detach = attach(model, lambda call: seen.calls.append(call))
    try:
        yield seen
    finally:
        detach()


def attach(model: nn.Module, keep: Keep) -> Callable[[], None]:
    """Let ``keep`` have every call of every router of a converted model from now on; gives what ends it.

    Raises UsageError for a model without mixtures, and one that is being observed; Refused for a graph whose router
    cannot be told any more, as after place-experts with copies.
    """
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, MoE)}
    if mixtures:
        return _attach_modules(mixtures, keep)
    if isinstance(model, fx.GraphModule):
        return attach_graph(model, keep)
    raise UsageError(NOTHING, hint=WHAT)


def _attach_modules(mixtures: Mapping[str, MoE], keep: Keep) -> Callable[[], None]:
    routers = {path: mixture.router for path, mixture in mixtures.items()}
    if any(router.observer is not None for router in routers.values()):
        raise UsageError("the model is being observed already")
    hooks = []
    for path, router in routers.items():
        keeper = _Keeper(keep, path, router)
        router.observer = keeper.keep
        hooks.append(router.register_forward_pre_hook(keeper.note))

    def detach() -> None:
        for router, hook in zip(routers.values(), hooks):
            router.observer = None
            hook.remove()

    return detach


@dataclass
class _Keeper:
    """``inputs`` are those of the call that is under way."""

    to: Keep
    block: str
    router: Router
    inputs: Tensor | None = None

    def note(self, router: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs = args[0]

    def keep(self, values: Mapping[str, Tensor]) -> None:
        inputs, self.inputs = self.inputs, None
        assert inputs is not None
        self.to(Observation(self.block, self.router, {**values, "inputs": inputs}, self.router.training))
