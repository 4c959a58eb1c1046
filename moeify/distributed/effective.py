"""The effective parameter count of a routed model: the size of the dense one that would reach the same loss.

Clark et al., Unified Scaling Laws for Routed Language Models, arXiv 2202.01169, base-10 logarithms:
``log L(N, E) = a log N + b log Eh + c log N log Eh + d``, where Eh is E saturated between E_start and E_max. Solving
for the dense N of the same loss gives the count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeify.errors import BadOption

CAVEAT = (
    "fitted to models trained from scratch with top-1 routing in every other layer; it does not predict an upcycled or "
    "carved model"
)


@dataclass(frozen=True)
class Law:
    """The constants of one way of routing (table 3 of the paper). From ``cutoff`` parameters on, routing is said to
    give nothing."""

    name: str
    a: float
    b: float
    c: float
    d: float
    start: float
    most: float
    cutoff: float


LAWS = (
    Law("S-BASE", -0.082, -0.108, 0.009, 1.104, 1.847, 314.478, 937e9),
    Law("RL-R", -0.083, -0.126, 0.012, 1.111, 1.880, 469.982, 85e9),
    Law("HASH", -0.087, -0.136, 0.012, 1.157, 4.175, 477.741, 83e9),
)


def saturated(law: Law, experts: int) -> float:
    """Eh: ``1 / Eh = 1 / (E - 1 + (1 / E_start - 1 / E_max)^-1) + 1 / E_max``."""
    return 1.0 / (1.0 / (experts - 1 + 1.0 / (1.0 / law.start - 1.0 / law.most)) + 1.0 / law.most)


def effective_parameters(law: Law, parameters: float, experts: int) -> float:
    """``N^(alpha(Eh) / alpha(E_start)) (Eh / E_start)^(b / alpha(E_start))``, ``alpha(E) = a + c log10 E``.

    ``parameters`` is N, of the dense model that was given experts. Raises BadOption for numbers below 1.
    """
    if parameters < 1 or experts < 1:
        raise BadOption(f"{parameters:g} parameters and {experts} experts: both must be at least 1")
    Eh = saturated(law, experts)
    start = _alpha(law, law.start)
    return parameters ** (_alpha(law, Eh) / start) * (Eh / law.start) ** (law.b / start)


def _alpha(law: Law, experts: float) -> float:
    return law.a + law.c * math.log10(experts)
