"""One step of training: a batch forward and backward, and the update, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify.distributed.gradients import clip_gradients, sync_gradients
from moeify.distributed.runner_data import Examples, part
from moeify.distributed.runner_forward import device_of, run_model
from moeify.distributed.runner_group import Ranks, Signals
from moeify.distributed.runner_loss import Consistency, Loss
from moeify.distributed.runner_routers import Routers
from moeify.distributed.schedule import Schedule
from moeify.errors import UsageError
from moeify.training.losses import RouterLosses


@dataclass(frozen=True)
class Step:
    """What a step was, over all ranks. ``loss`` and ``router_losses``, by name, are means over its parts and passes;
    ``consistency`` is the mean distance of two passes in nats, None where there was one."""

    loss: float
    norm: float
    stop: bool
    router_losses: dict[str, float]
    consistency: float | None


@dataclass(frozen=True)
class _Pass:
    """A forward pass: the sum of its losses, and how many there are."""

    output: Any
    loss: Tensor
    count: float
    routers: RouterLosses | None


@dataclass(frozen=True)
class Stepper:
    """What all steps of a run share."""

    module: nn.Module
    ranks: Ranks
    examples: Examples
    loss: Loss
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    routers: Routers
    consistency: Consistency | None = None

    def step(self, step: int, signals: Signals) -> Step:
        """Number ``step``, from 0. Raises what ``training.train`` raises."""
        schedule, ranks = self.schedule, self.ranks
        torch.manual_seed((schedule.seed * 1_000_003 + step) * 4099 + ranks.rank)
        self.optimizer.zero_grad()
        mean, stop, named, apart = 0.0, False, dict[str, float](), 0.0
        which = self.examples.shuffled(step, schedule.batch)
        size, share = schedule.batch // schedule.accumulate, 1 / schedule.accumulate
        for start in range(0, schedule.batch, size):
            mine = part(which[start : start + size], ranks.size, ranks.rank)
            batch = self.examples.take(mine.which, device_of(self.module))
            passes = [self._forward(batch, mine.counted) for _ in range(1 if self.consistency is None else 2)]
            value = torch.stack([one.loss for one in passes]).mean()
            flag = signals.name is not None
            count = passes[0].count
            total, terms, flagged = ranks.total_loss(float(value.detach()), count, f"step {step + 1}", flag)
            # sync_gradients divides by the ranks, whose parts of the sum need not be alike.
            whole = value * (ranks.size / max(terms, 1.0))
            for one in passes:
                if one.routers is not None:
                    whole = whole + one.routers.total / len(passes)
                for name, added in (one.routers or {}).items():
                    named[name] = named.get(name, 0.0) + share * float(added.detach()) / len(passes)
            if self.consistency is not None:
                distance, nats = self._apart(self.consistency, passes, batch, mine.counted, f"step {step + 1}")
                whole, apart = whole + self.consistency.weight * distance, apart + share * nats
            (share * whole).backward()
            mean, stop = mean + share * total / max(terms, 1.0), stop or flagged
        sync_gradients(self.module)
        norm = clip_gradients(self.module, schedule.clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        self.optimizer.step()
        self.routers.after_step(batch, mine.counted)
        return Step(mean, norm, stop, named, None if self.consistency is None else apart)

    def _forward(self, batch: dict[str, Tensor], counted: int) -> _Pass:
        """Router losses are of the last pass alone, so they are asked for before the next one."""
        device = device_of(self.module)
        before = None if self.consistency is None else _generators(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.schedule.amp):
            output = run_model(self.module, self.examples, batch)
            if before is not None and before == _generators(device):
                raise UsageError(
                    "nothing in the model draws a random number in training, so two passes cannot differ",
                    hint="leave the consistency out, or convert with a router that draws ('moeify routers --table')",
                )
            value, count = self.loss(output, batch, counted)
        return _Pass(output, value, count, self.routers.losses(batch, counted))

    def _apart(
        self, consistency: Consistency, passes: list[_Pass], batch: Mapping[str, Tensor], counted: int, where: str
    ) -> tuple[Tensor, float]:
        """How far two passes are apart: this rank's part of the mean over the predictions of all ranks, times their
        number as ``sync_gradients`` divides by it; and that mean."""
        value, count = consistency.divergence(passes[0].output, passes[1].output, batch)
        if not counted:
            value, count = value * 0.0, count * 0.0
        total, terms = self.ranks.total([float(value.detach()), float(count)], where)
        return value * (self.ranks.size / max(terms, 1.0)), total / max(terms, 1.0)


def _generators(device: torch.device) -> list[bytes]:
    """The states of the generators that a model there draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]
