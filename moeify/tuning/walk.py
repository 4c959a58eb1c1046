"""Moving along a frontier until a measured figure is what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_FARTHEST = 4.0  # a measured value may move the prediction by this factor at a time: a loss of 0 is one measured as 0


@dataclass
class Walk:
    """``predicted`` values rise along the sequence, all of one sign; wanted is the last position whose measured value
    is within ``bound``. Of the prediction only one factor is learnt, that of the last measurement.
    """

    predicted: Sequence[float]
    bound: float
    factor: float = 1.0
    met: int | None = None  # the last position that was measured to be within the bound
    missed: int | None = None  # the first that was measured not to be
    measured: dict[int, float] = field(default_factory=dict)

    def run(self, measure: Callable[[int], float], tries: int, worth: Callable[[int, int], bool]) -> int | None:
        """The best position that was measured and met, None where none did. ``worth`` says whether going from one
        position to a later one is worth another measurement.
        """
        for _ in range(tries):
            at = self._next()
            if at is None or (self.met is not None and not worth(self.met, at)):
                break
            value = self.measured[at] = measure(at)
            if value <= self.bound:
                self.met = at
            else:  # NaN misses
                self.missed = at
            self._learn(at, value)
        return self.met

    def _next(self) -> int | None:
        first = 0 if self.met is None else self.met + 1
        last = len(self.predicted) if self.missed is None else self.missed
        if first >= last:
            return None
        within = [at for at in range(first, last) if self.predicted[at] * self.factor <= self.bound]
        if within:
            return within[-1]
        # Nothing between is expected to do: after one that did that is the end, else the surest is tried.
        return first if self.met is None else None

    def _learn(self, at: int, value: float) -> None:
        predicted = self.predicted[at]
        if predicted:
            found = value / predicted
            least, most = self.factor / _FARTHEST, self.factor * _FARTHEST
            worst = most if predicted > 0 else least
            self.factor = min(max(found, least), most) if found == found else worst
