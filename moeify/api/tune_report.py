"""What ``moeify tune`` chose and measured: one object for the screen and for --json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moeify.api.quality_report import OutputQuality
from moeify.ir.report import Report

PERPLEXITY, AGREEMENT, COSINE, SQUARES = "perplexity kept", "agreement", "cosine", "square kept"
_KINDS = {"next tokens": PERPLEXITY, "tokens": AGREEMENT, "classes": AGREEMENT, "embeddings": COSINE}


def measure_of(kind: str) -> str:
    """What is kept of an output of this kind (``output_kinds``), as a share of 1."""
    return _KINDS.get(kind, SQUARES)


def kept(one: OutputQuality) -> float:
    """Dense over converted perplexity; the share of predictions that stay; the mean cosine; 1 less the square of the
    relative error.
    """
    measure = measure_of(one.kind)
    if measure == PERPLEXITY:
        return 1.0 / _known(one.perplexity_ratio)
    if measure == AGREEMENT:
        return _known(one.agreement)
    return _known(one.cosine) if measure == COSINE else 1.0 - one.rms_error**2


def loss_at(measure: str, quality: float) -> float:
    """The loss of ``tuning.likelihood.Predicted`` at which so much is expected to be kept.

    exp(-loss) of the perplexity, 1 - loss of the cosine, 1 - 2 loss of the square. Of predictions about 1 -
    sqrt(loss / 2): by Pinsker's inequality no more probability than sqrt(loss / 2) moves.
    """
    if measure == PERPLEXITY:
        return -math.log(quality) if quality > 0 else math.inf
    if measure == AGREEMENT:
        return 2.0 * (1.0 - quality) ** 2
    return 1.0 - quality if measure == COSINE else (1.0 - quality) / 2.0


def quality_at(measure: str, loss: float) -> float:
    """The inverse of ``loss_at``; not below 0."""
    if measure == PERPLEXITY:
        return math.exp(-loss)
    if measure == AGREEMENT:
        return max(0.0, 1.0 - math.sqrt(loss / 2.0))
    return max(0.0, 1.0 - loss if measure == COSINE else 1.0 - 2.0 * loss)


def _known(value: float | None) -> float:
    assert value is not None
    return value


@dataclass(frozen=True)
class BlockChoice:
    """What became of a block: ``share`` of its hidden units are on for a token, 1 where it stays dense.

    ``nonzero`` is the share of its hidden values that are not zero, ``loss`` what the split is expected to cost (see
    ``tuning.likelihood``), ``half_loss`` what any block would at about half of its units, to compare blocks by.
    """

    path: str
    d_ff: int
    share: float
    experts: int
    top_k: int
    shared: int
    nonzero: float
    loss: float
    half_loss: float | None


@dataclass
class FrontierPoint:
    """An allocation. ``flops`` and times are shares of the dense feed-forward blocks' FLOPs and of the dense model's
    seconds; ``quality`` is what is kept. What is expected is corrected by one factor for what is lost and one for the
    time that is saved, from all points that were converted and measured. ``measured_time`` is in ONNX Runtime.
    """

    flops: float
    loss: float
    expected_quality: float
    expected_time: float
    quality: float | None = None
    measured_time: float | None = None
    chosen: bool = False


@dataclass
class TuneReport:
    """``frontier`` goes from dense to the least work. ``goal`` is ``keep``, ``speedup`` or ``flops``; ``measure`` is
    what ``keep`` and ``quality`` are of, ``speedup`` the dense model's time over the converted one's at ``time_tokens``
    tokens on ``threads`` (None: all cores), ``lowerings`` what ran its blocks where that was measured. ``rows`` are
    rows of a block, fitted to, chosen by and tested on; ``stages`` the seconds of each part of the work.
    """

    model: str
    goal: str
    target: float
    measure: str
    quality: float
    speedup: float
    speedup_measured: bool
    lowerings: list[str]
    time_tokens: int
    threads: int | None
    flops: float
    blocks: list[BlockChoice]
    frontier: list[FrontierPoint]
    outputs: list[OutputQuality]
    source: str
    tested: str
    rows: dict[str, int]
    recipe: dict[str, Any]
    conversion: Report
    notes: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    output: str | None = None
    recipe_output: str | None = None
    plot: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        outputs = [{**asdict(one), "perplexity_ratio": one.perplexity_ratio} for one in self.outputs]
        return {**asdict(self), "outputs": outputs, "conversion": self.conversion.to_dict()}

    def shown(self, most: int = 12) -> list[FrontierPoint]:
        """The frontier at about even steps of FLOPs, with every point that was measured."""
        return thinned(self.frontier, most)


def thinned(points: Sequence[FrontierPoint], most: int) -> list[FrontierPoint]:
    """First, last, those that were measured, and between them one in each of ``most`` equal steps of FLOPs."""
    step = (points[0].flops - points[-1].flops) / most
    found: list[FrontierPoint] = []
    bound = math.inf
    for number, point in enumerate(points):
        if point.flops <= bound or point.quality is not None or number == len(points) - 1:
            found.append(point)
            bound = min(bound, point.flops - step)
    return found
