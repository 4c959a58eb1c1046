"""The report of ``moeify quality``: one object for the screen and for --json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class BlockQuality:
    """A converted block on the dense model's own inputs, and the loads of its experts as the converted model runs.

    ``rms_error`` is the root mean square of the difference over that of the dense block's output, ``cosine`` the mean
    over the rows. ``load`` is each expert's share of the slots, ``load_entropy`` its entropy over that of equal
    shares, ``load_cv`` the standard deviation over the mean, ``load_peak`` the largest over the mean.
    """

    path: str
    anchor: str
    rows: int
    rms_error: float
    cosine: float
    load: list[float]
    load_entropy: float
    load_cv: float
    load_peak: float


@dataclass(frozen=True)
class OutputQuality:
    """One output of the whole model. Figures that do not belong to its kind (see ``output_kinds``) are None.

    ``rows`` are those of the errors, without padding; ``predictions`` those that predict. ``divergence`` is the mean
    KL(dense || converted) in nats, ``agreement`` the share of predictions with the same most probable class or token.
    Perplexities are those of the next tokens in the data, each piece of a text on its own.
    """

    name: str
    kind: str
    rows: int
    max_relative_error: float
    rms_error: float
    cosine: float | None = None
    predictions: int = 0
    divergence: float | None = None
    agreement: float | None = None
    dense_perplexity: float | None = None
    perplexity: float | None = None

    @property
    def perplexity_ratio(self) -> float | None:
        """Converted over dense."""
        if self.perplexity is None or self.dense_perplexity is None:
            return None
        return self.perplexity / self.dense_perplexity


@dataclass
class QualityReport:
    """``missed`` are the demands that the converted model does not meet, in words."""

    dense: str
    moe: str
    source: str
    batches: int
    blocks: list[BlockQuality]
    outputs: list[OutputQuality]
    missed: list[str]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        outputs = [{**asdict(one), "perplexity_ratio": one.perplexity_ratio} for one in self.outputs]
        return {**asdict(self), "outputs": outputs}
