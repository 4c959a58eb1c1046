"""Training a bound module: steps that do not depend on the number of ranks, checkpoints, and a clean end."""

from __future__ import annotations

import math
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
from moeify.distributed.gradients import clip_gradients, sync_gradients
from moeify.distributed.runner_data import Examples, part
from moeify.distributed.runner_forward import device_of, run_model
from moeify.distributed.runner_group import Ranks, Signals
from moeify.distributed.runner_loss import Loss
from moeify.distributed.runner_routers import Routers
from moeify.errors import BadOption, NonFiniteValues, UsageError
from moeify.training.watch import find

FACTORS = "router loss factors"  # among the facts of a checkpoint

DECAYS = ("constant", "cosine")


@dataclass(frozen=True)
class Schedule:
    """AdamW (Loshchilov and Hutter 2019). ``batch`` counts the examples of all ranks together; ``clip`` is the largest
    norm of the gradients, 0 for any.

    The rate rises linearly for ``warmup`` steps, then it is constant or falls to 0 by half a cosine (Loshchilov and
    Hutter 2017). A batch is run in ``accumulate`` equal parts, of whose losses the mean is taken. With ``amp`` the
    forward pass is autocast to bfloat16.
    """

    steps: int
    batch: int = 8
    rate: float = 1e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    warmup: int = 0
    decay: str = "constant"
    accumulate: int = 1
    amp: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise BadOption(f"steps {self.steps} and batch {self.batch} must be at least 1")
        if min(self.rate, self.weight_decay, self.clip, self.warmup) < 0:
            raise BadOption("the rate, weight-decay, clip and warmup must not be negative")
        if self.decay not in DECAYS:
            raise BadOption(f"there is no decay {self.decay!r}", hint=f"choose one of {', '.join(DECAYS)}")
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise BadOption(f"a batch of {self.batch} is not cut into {self.accumulate} equal parts")

    def rate_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.rate
        return self.rate * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2

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
    """``losses`` are the mean losses of the steps from ``first`` on, before their update, without router losses; those
    are in ``router_losses`` by name, weighted and summed over the blocks."""

    first: int
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: str | None = None
    saved: Path | None = None
    router_losses: dict[str, list[float]] = field(default_factory=dict)

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

    A SIGTERM or SIGINT on any rank ends the run on all of them after the step, with a checkpoint. A random number of
    the model, such as dropout, depends on seed, step and rank.

    Raises NonFiniteValues for a loss or gradients that are NaN or infinity, on every rank and before any update;
    UsageError for a folder that holds another run, with what was different; what checkpoints raise; RankLost.
    """
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, schedule.rate, weight_decay=schedule.weight_decay)
    said = {**schedule.facts(examples), **(facts or {})}
    made = Trained(_resume(module, ranks, optimizer, said, schedule, saving))
    last_saved = made.first
    begun(made.first)
    routers = Routers(module, ranks, masks or {})
    with Signals() as signals:
        for step in range(made.first, schedule.steps):
            began = time.perf_counter()
            try:
                mean, norm, stop, added = _step(
                    module, ranks, examples, loss, schedule, step, optimizer, signals, routers
                )
            except NonFiniteValues as error:
                raise _with_advice(error, step, saving) from error
            made.losses.append(mean)
            made.norms.append(norm)
            made.rates.append(schedule.rate_at(step))
            for name, value in added.items():
                made.router_losses.setdefault(name, []).append(value)
            made.seconds.append(time.perf_counter() - began)
            if stop:
                made.stopped = signals.name or "a signal to another rank"
            end = stop or step + 1 == schedule.steps
            if saving is not None and (end or (step + 1) % saving.every == 0):
                made.saved = checkpoint.save(
                    module, ranks.mesh, saving.folder, step + 1,
                    optimizer=optimizer, facts={**said, FACTORS: _factors(module)}, keep=saving.keep,
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
    routers: Routers,
) -> tuple[float, float, bool, dict[str, float]]:
    """(mean loss, norm of the gradients, whether to stop, router losses by name)."""
    device = device_of(module)
    torch.manual_seed((schedule.seed * 1_000_003 + step) * 4099 + ranks.rank)
    optimizer.zero_grad()
    mean, stop, named = 0.0, False, dict[str, float]()
    which = examples.shuffled(step, schedule.batch)
    size, share = schedule.batch // schedule.accumulate, 1 / schedule.accumulate
    for start in range(0, schedule.batch, size):
        mine = part(which[start : start + size], ranks.size, ranks.rank)
        batch = examples.take(mine.which, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=schedule.amp):
            value, count = loss(run_model(module, examples, batch), batch, mine.counted)
        flag = signals.name is not None
        total, terms, flagged = ranks.total_loss(float(value.detach()), count, f"step {step + 1}", flag)
        # sync_gradients divides by the ranks, whose parts of the sum need not be alike.
        whole = value * (ranks.size / max(terms, 1.0))
        added = routers.losses(batch, mine.counted)
        (share * (whole if added is None else whole + added.total)).backward()
        mean, stop = mean + share * total / max(terms, 1.0), stop or flagged
        for name, one in (added or {}).items():
            named[name] = named.get(name, 0.0) + share * float(one.detach())
    sync_gradients(module)
    norm = clip_gradients(module, schedule.clip or float("inf"))
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate_at(step)
    optimizer.step()
    routers.after_step(batch, mine.counted)
    return mean, norm, stop, named


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
