"""How a run trains: its steps, batches and learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moeify.distributed.runner_data import Examples
from moeify.errors import BadOption

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
