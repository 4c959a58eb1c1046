"""Training a bound module: steps that do not depend on the number of ranks, checkpoints, and a clean end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.distributed import checkpoint
from moeify.distributed import checkpoint_folder as folders
from moeify.distributed.agreement import agreed
from moeify.distributed.runner_data import Examples
from moeify.distributed.runner_group import Ranks, Signals
from moeify.distributed.runner_loss import Consistency, Loss
from moeify.distributed.runner_routers import Routers
from moeify.distributed.schedule import Schedule
from moeify.distributed.stepping import Stepper
from moeify.errors import BadOption, NonFiniteValues, UsageError
from moeify.training.watch import find

FACTORS = "router loss factors"  # among the facts of a checkpoint


@dataclass(frozen=True)
class Saving:
    """Where checkpoints go: every ``every`` steps and after the last, the newest ``keep`` of them stay."""

    folder: Path
    every: int = 100
    keep: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise BadOption(f"every {self.every} and keep {self.keep} must be at least 1")


@dataclass
class Trained:
    """``losses`` are the mean losses of the steps from ``first`` on, before their update, without router losses; those
    are in ``router_losses`` by name, weighted and summed over the blocks. ``consistency`` is how far two forward passes
    were apart, in nats, without its weight; empty where there was one."""

    first: int
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: str | None = None
    saved: Path | None = None
    router_losses: dict[str, list[float]] = field(default_factory=dict)
    consistency: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps done since the very beginning."""
        return self.first + len(self.losses)


def train(
    module: nn.Module,
    ranks: Ranks,
    examples: Examples,
    loss: Loss,
    schedule: Schedule,
    saving: Saving | None = None,
    *,
    masks: Mapping[str, str] | None = None,
    consistency: Consistency | None = None,
    facts: Mapping[str, Any] | None = None,
    begun: Callable[[int], None] = lambda steps: None,
    done: Callable[[Trained], None] = lambda trained: None,
) -> Trained:
    """Run the schedule's steps, or those that a checkpoint has left. ``begun`` hears how many are done already, once
    the weights are read, and ``done`` of each step.

    Parameters that require no gradient stay as they are. ``facts``, plain data by name, must be the same when a run
    goes on, beside those of the schedule.

    Where the module is observed (``moeify.observe``), the router losses of its recipe are added to the loss and its
    routers are updated after each step, both over the tokens of all ranks; ``masks`` are those of ``Routers``.

    With ``consistency`` each batch is run twice: the loss and the router losses are the means over the two passes, and
    routers and coefficients are updated once a step, by the second.

    A SIGTERM or SIGINT on any rank ends the run on all of them after the step, with a checkpoint. A random number of
    the model, such as dropout, depends on seed, step and rank.

    Raises NonFiniteValues for a loss or gradients that are NaN or infinity, on every rank and before any update;
    UsageError for a folder that holds another run, with what was different, and for a consistency where nothing in the
    model is random in training; what checkpoints raise; RankLost.
    """
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, schedule.rate, weight_decay=schedule.weight_decay)
    said = {**schedule.facts(examples), **(facts or {})}
    made = Trained(_resume(module, ranks, optimizer, said, schedule, saving))
    last_saved = made.first
    begun(made.first)
    routers = Routers(module, ranks, masks or {})
    stepper = Stepper(module, ranks, examples, loss, schedule, optimizer, routers, consistency)
    with Signals() as signals:
        for step in range(made.first, schedule.steps):
            began = time.perf_counter()
            try:
                one = stepper.step(step, signals)
            except NonFiniteValues as error:
                raise _with_advice(error, step, saving) from error
            made.losses.append(one.loss)
            made.norms.append(one.norm)
            made.rates.append(schedule.rate_at(step))
            if one.consistency is not None:
                made.consistency.append(one.consistency)
            for name, value in one.router_losses.items():
                made.router_losses.setdefault(name, []).append(value)
            made.seconds.append(time.perf_counter() - began)
            if one.stop:
                made.stopped = signals.name or "a signal to another rank"
            end = one.stop or step + 1 == schedule.steps
            if saving is not None and (end or (step + 1) % saving.every == 0):
                made.saved = checkpoint.save(
                    module, ranks.mesh, saving.folder, step + 1,
                    optimizer=optimizer, facts={**said, FACTORS: _factors(module)}, keep=saving.keep,
                )  # fmt: skip
                last_saved = step + 1
            done(made)
            if one.stop:
                break
    assert saving is None or last_saved == made.steps
    return made


def _resume(
    module: nn.Module,
    ranks: Ranks,
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    schedule: Schedule,
    saving: Saving | None,
) -> int:
    """The steps that are done already, the same on all ranks."""
    if saving is None:
        return 0
    found, done = agreed(
        ranks.groups, "resume", lambda: _last(saving, schedule, facts), alike=lambda last: f"step {last[1]}"
    )
    if found is not None:
        state = checkpoint.load(module, ranks.mesh, found, optimizer=optimizer)
        watch = find(module)
        if watch is not None:
            watch.factors.update(state.facts.get(FACTORS, {}))
    return done


def _factors(module: nn.Module) -> dict[str, float]:
    """The coefficients that router losses have adapted."""
    watch = find(module)
    return {} if watch is None else dict(watch.factors)


def _last(saving: Saving, schedule: Schedule, facts: Mapping[str, Any]) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and its step. Raises UsageError for one that does not fit this run."""
    found = folders.latest(saving.folder)
    if found is None:
        return None, 0
    state = folders.read_state(found)
    if not saving.resume:
        raise UsageError(
            f"{saving.folder} holds checkpoints up to step {state.step}",
            hint="--resume goes on from there; or choose another folder",
        )
    was, now = ({name: str(value) for name, value in one.items()} for one in (state.facts, facts))
    others = [f"{name} was {was.get(name, 'not told')}, now {now[name]}" for name in now if was.get(name) != now[name]]
    if others:
        raise UsageError(
            f"{found} was made by another run: {'; '.join(others)}",
            hint="go on with the same data and the same options, or start in another folder",
        )
    if state.step >= schedule.steps:
        raise UsageError(
            f"{found} has done {state.step} steps already, and --steps is {schedule.steps}", hint="ask for more steps"
        )
    return found, state.step


def _with_advice(error: NonFiniteValues, step: int, saving: Saving | None) -> NonFiniteValues:
    kept = folders.latest(saving.folder) if saving is not None else None
    hint = error.hint or ""
    if kept is not None:
        hint += f"; the last good checkpoint is {kept}"
    return NonFiniteValues(error.what, where=f"step {step + 1}", hint=hint)
