"""Errors of a lowering, call by call: the exported torch graph is run on what the runtime itself computed.

At each call the torch graph is given the runtime's rows, and after it the runtime's result, so that the error of a call
is that of its own router and experts and nothing adds up. A token whose scores tie to within rounding may go to other
experts than in torch; such tokens are counted and their values not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moeify.backends.calls import Call, Seen
from moeify.verify.measure import relative_error


@dataclass(frozen=True)
class CallError:
    """``relative_error`` over the tokens that both send to the same experts; how many there are, how many are not."""

    relative_error: float
    tokens: int
    rerouted: int


def call_errors(
    module: fx.GraphModule, calls: Sequence[Call], seen: Mapping[str, Seen], inputs: Sequence[torch.Tensor]
) -> dict[str, CallError]:
    """By ``Call.name``. ``module`` is the exported graph that the names in ``calls`` belong to."""
    forced = _Forced(module, calls, seen)
    with torch.no_grad():
        forced.run(*inputs)
    return forced.errors


class _Forced(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, calls: Sequence[Call], seen: Mapping[str, Seen]) -> None:
        # Without garbage collection of values: the experts are looked at when the call's result is there.
        super().__init__(module, garbage_collect_values=False)
        self.errors: dict[str, CallError] = {}
        self._rows = {call.rows: seen[call.name].rows for call in calls}
        self._ends = {call.output: (call, seen[call.name]) for call in calls}
        self._experts = {call.experts for call in calls}
        self._chosen: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._experts:
            self._chosen[n.name] = value
        if n.name in self._ends:
            call, there = self._ends[n.name]
            self.errors[call.name] = _compare(value, self._chosen[call.experts], there)
            return there.output.to(value) if there.output.shape == value.shape else value
        if n.name in self._rows:
            return self._rows[n.name].to(value)
        return value


def _compare(value: torch.Tensor, experts: torch.Tensor, there: Seen) -> CallError:
    if value.shape != there.output.shape or experts.shape != there.experts.shape:
        return CallError(float("inf"), value.shape[0], 0)
    same = (experts.sort(1).values == there.experts.sort(1).values).all(1)
    rerouted = int((~same).sum())
    return CallError(relative_error(there.output[same], value[same]), value.shape[0], rerouted)
