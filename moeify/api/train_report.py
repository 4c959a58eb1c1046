"""The result of ``moeify train``: one object for Python, for the screen and for --json."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moeify.api.train_heldout import HeldOut
from moeify.distributed.training import Trained
from moeify.training.routing_report import RoutingReport


@dataclass
class TrainReport:
    """``run`` has the figures of every step, ``held_out`` those before, at every eval-every steps and after, and
    ``routing`` is what the routers do in the end; None for a run that was stopped. ``loss_is`` says in words what the
    losses of the steps are, ``classes`` what the labels of a folder of images are called. ``module`` is the trained
    model, in evaluation, on the device it was trained on.
    """

    model: str
    device: str
    loss_is: str
    examples: int
    tokens_per_step: int
    trained_parameters: int
    parameters: int
    run: Trained
    module: nn.Module = field(repr=False)
    classes: tuple[str, ...] = ()
    held_out: list[HeldOut] = field(default_factory=list)
    routing: RoutingReport | None = None
    output: str | None = None
    plot: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        """The median, without the first step, which allocates what the others find."""
        return statistics.median(self.run.seconds[1:] or self.run.seconds)

    def to_dict(self) -> dict[str, Any]:
        run, per_step = self.run, self.seconds_per_step
        return {
            "model": self.model,
            "output": self.output,
            "device": self.device,
            "loss_is": self.loss_is,
            "examples": self.examples,
            "classes": list(self.classes),
            "trained_parameters": self.trained_parameters,
            "parameters": self.parameters,
            "first_step": run.first + 1,
            "steps": run.steps,
            "losses": run.losses,
            "router_losses": run.router_losses,
            "consistency": run.consistency,
            "learning_rates": run.rates,
            "gradient_norms": run.norms,
            "seconds_per_step": per_step,
            "tokens_per_second": self.tokens_per_step / per_step if self.tokens_per_step else None,
            "held_out": [one.to_dict() for one in self.held_out],
            "routing": None if self.routing is None else self.routing.to_dict(),
            "stopped": run.stopped,
            "checkpoint": str(run.saved) if run.saved else None,
            "plot": self.plot,
            "notes": self.notes,
            "seconds": self.seconds,
        }
