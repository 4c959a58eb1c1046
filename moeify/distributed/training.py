"""Training a bound module: steps that do not depend on the number of ranks, checkpoints, and a clean end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.distributed import checkpoint
from moeify.distributed import checkpoint_folder as folders
from moeify.distributed.agreement import agreed
from moeify.distributed.gradients import clip_gradients, sync_gradients
from moeify.distributed.runner_data import Examples, part
from moeify.distributed.runner_forward import run_model
from moeify.distributed.runner_group import Ranks, Signals
from moeify.distributed.runner_loss import Loss
from moeify.errors import BadOption, NonFiniteValues, UsageError


@dataclass(frozen=True)
class Schedule:
    """AdamW (Loshchilov and Hutter 2019) with a constant rate. ``batch`` counts the examples of all ranks together;
    ``clip`` is the largest norm of the gradients, 0 for any."""

    steps: int
    batch: int = 8
    rate: float = 1e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise BadOption(f"steps {self.steps} and batch {self.batch} must be at least 1")
        if min(self.rate, self.weight_decay, self.clip) < 0:
            raise BadOption("the rate, weight-decay and clip must not be negative")

    def facts(self, examples: Examples) -> dict[str, Any]:
        """What must be the same for a run that goes on where another one stopped."""
        return {"batch": self.batch, "seed": self.seed, "examples": examples.count}


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
    """``losses`` are the mean losses of the steps from ``first`` on, before their update."""

    first: int
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: str | None = None
    saved: Path | None = None

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
    done: Callable[[Trained], None] = lambda trained: None,
) -> Trained:
    """Run the schedule's steps, or those that a checkpoint has left. ``done`` hears of each.

    A SIGTERM or SIGINT on any rank ends the run on all of them after the step, with a checkpoint. A random number of
    the model, such as dropout, depends on seed, step and rank.

    Raises NonFiniteValues for a loss or gradients that are NaN or infinity, on every rank and before any update;
    UsageError for a folder that holds another run; what checkpoints raise; RankLost.
    """
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), schedule.rate, weight_decay=schedule.weight_decay)
    made = Trained(_resume(module, ranks, optimizer, examples, schedule, saving))
    last_saved = made.first
    with Signals() as signals:
        for step in range(made.first, schedule.steps):
            began = time.perf_counter()
            try:
                mean, norm, stop = _step(module, ranks, examples, loss, schedule, step, optimizer, signals)
            except NonFiniteValues as error:
                raise _with_advice(error, step, saving) from error
            made.losses.append(mean)
            made.norms.append(norm)
            made.seconds.append(time.perf_counter() - began)
            if stop:
                made.stopped = signals.name or "a signal to another rank"
            end = stop or step + 1 == schedule.steps
            if saving is not None and (end or (step + 1) % saving.every == 0):
                made.saved = checkpoint.save(
                    module, ranks.mesh, saving.folder, step + 1,
                    optimizer=optimizer, facts=schedule.facts(examples), keep=saving.keep,
                )  # fmt: skip
                last_saved = step + 1
            done(made)
            if stop:
                break
    assert saving is None or last_saved == made.steps
    return made


def _step(
    module: nn.Module,
    ranks: Ranks,
    examples: Examples,
    loss: Loss,
    schedule: Schedule,
    step: int,
    optimizer: torch.optim.Optimizer,
    signals: Signals,
) -> tuple[float, float, bool]:
    """(mean loss, norm of the gradients, whether to stop)."""
    mine = part(examples.shuffled(step, schedule.batch), ranks.size, ranks.rank)
    batch = examples.take(mine.which)
    torch.manual_seed((schedule.seed * 1_000_003 + step) * 4099 + ranks.rank)
    optimizer.zero_grad()
    value, count = loss(run_model(module, examples, batch), batch, mine.counted)
    where = f"step {step + 1}"
    total, terms, stop = ranks.total_loss(float(value.detach()), count, where, signals.name is not None)
    # sync_gradients divides by the ranks, whose parts of the sum need not be alike.
    (value * (ranks.size / max(terms, 1.0))).backward()
    sync_gradients(module)
    norm = clip_gradients(module, schedule.clip or float("inf"))
    optimizer.step()
    return total / max(terms, 1.0), norm, stop


def _resume(
    module: nn.Module,
    ranks: Ranks,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    schedule: Schedule,
    saving: Saving | None,
) -> int:
    """The steps that are done already, the same on all ranks."""
    if saving is None:
        return 0
    found, done = agreed(
        ranks.groups, "resume", lambda: _last(saving, schedule, examples), alike=lambda last: f"step {last[1]}"
    )
    if found is not None:
        checkpoint.load(module, ranks.mesh, found, optimizer=optimizer)
    return done


def _last(saving: Saving, schedule: Schedule, examples: Examples) -> tuple[Path | None, int]:
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
    for name, value in schedule.facts(examples).items():
        if state.facts.get(name) != value:
            raise UsageError(
                f"{found} was made with {name} {state.facts.get(name)}, and this run has {value}",
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
