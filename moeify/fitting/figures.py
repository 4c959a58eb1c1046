"""How far a split block is from the dense one, and how its router chooses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.fitting.mixture import Mixture
from moeify.fitting.routers import largest
from moeify.nn.routers.router import Router
from moeify.verify.fidelity import ExpertLoad

ROWS = 1024  # of hidden values at a time


@dataclass(frozen=True)
class Routing:
    """How a router chooses. ``agreement`` is the share of the chosen experts that are among their token's ``top_k`` of
    the largest outputs; ``load_cv`` the standard deviation of the experts' loads over their mean; ``load_entropy`` the
    entropy of the loads over that of equal ones.
    """

    agreement: float
    load_cv: float
    load_entropy: float


@dataclass(frozen=True)
class Fitted:
    """Figures of one block on rows that were not fitted to.

    Errors are the root mean square of the difference to the dense block over that of the dense block's output, both
    on the inputs that the converted model gives: with the fitted router, and with the repaired weights too (None where
    there was no repair). ``unknowns`` are those of the repair for each output.
    """

    rows: int  # fitted to
    held_out: int
    error: float
    repaired_error: float | None
    kept: bool  # whether the repair was better, and so is in the weights
    unknowns: int
    routing: Routing


def gates(router: Router, x_ND: Tensor, experts: int) -> Tensor:
    """The weight of every expert [N, E], zero for those not chosen."""
    experts_NK, weights_NK = router(x_ND)
    return _by_expert(experts_NK, weights_NK.float(), experts)


def _by_expert(experts_NK: Tensor, values_NK: Tensor, experts: int) -> Tensor:
    """[N, E]; a slot without an expert, number E, is nowhere."""
    spread = values_NK.new_zeros(len(values_NK), experts + 1).scatter_(1, experts_NK, values_NK)
    return spread[:, :experts]


def rms_error(mixture: Mixture, router: Router, x_ND: Tensor, whole: Callable[[Tensor], Tensor]) -> float:
    """``Fitted.error`` on rows x; ``whole`` gives the dense block's output for its hidden value."""
    wrong = right = 0.0
    for x in x_ND.split(ROWS):
        h_NF = mixture.hidden(x)
        y_ND = whole(h_NF)
        wrong += float((mixture.output(h_NF, gates(router, x, mixture.experts)) - y_ND).double().square().sum())
        right += float(y_ND.double().square().sum())
    if not right:
        return 0.0 if not wrong else math.inf
    return math.sqrt(wrong / right)


def routing_of(mixture: Mixture, router: Router, x_ND: Tensor) -> Routing:
    load = ExpertLoad(mixture.experts)
    agreed = slots = 0.0
    for x in x_ND.split(ROWS):
        experts_NK = router(x)[0]
        chosen_NE = _by_expert(experts_NK, torch.ones_like(experts_NK, dtype=x.dtype), mixture.experts)
        agreed += float((chosen_NE * largest(mixture.sizes(mixture.hidden(x)), router.top_k)).sum())
        slots += float(chosen_NE.sum())
        load.add(experts_NK)
    return Routing(agreement=agreed / slots, load_cv=load.variation, load_entropy=load.entropy)
