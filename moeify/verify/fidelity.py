"""How well one model stands in for another: measures that are added up batch by batch, in float64.

Rows are what is compared: tokens of a block, positions of a text, examples. None of them is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moeify.ir.difference import wide

_VALUES = 1 << 23  # that are widened at a time: rows may be as wide as a vocabulary


def _parts(rows: Tensor) -> Iterator[slice]:
    """Rows that are taken together."""
    step = max(1, _VALUES // max(1, rows[:1].numel()))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _dot(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Row by row, [N]: without the products, which are as many as the values."""
    return torch.bmm(a_ND.unsqueeze(1), b_ND.unsqueeze(2)).flatten()


class RowErrors:
    """Values [N, D] against references [N, D]."""

    def __init__(self) -> None:
        self.rows = 0
        self._wrong = self._right = self._cosines = 0.0

    def add(self, value_ND: Tensor, reference_ND: Tensor) -> None:
        self.rows += len(reference_ND)
        for part in _parts(reference_ND):
            value, reference = (wide(rows[part]).flatten(1) for rows in (value_ND, reference_ND))
            difference = value - reference
            right_N = _dot(reference, reference)
            self._wrong += float(_dot(difference, difference).sum())
            self._right += float(right_N.sum())
            product, sizes = _dot(value, reference), _dot(value, value).sqrt() * right_N.sqrt()
            alike = (value == reference).all(1)  # rows of zeros have no direction
            self._cosines += float(torch.where(alike, 1.0, torch.where(sizes == 0, 0.0, product / sizes)).sum())

    @property
    def rms_error(self) -> float:
        """Root mean square of the difference over that of the reference."""
        if not self._right:
            return math.inf if self._wrong else 0.0
        return math.sqrt(self._wrong / self._right)

    @property
    def cosine(self) -> float:
        """Mean over the rows; a row of zeros has cosine 0 with any other than itself."""
        return self._cosines / self.rows


class LargestError:
    """``ir.difference.relative_error`` of all that was added: the largest difference over the largest reference."""

    def __init__(self) -> None:
        self._difference = self._scale = 0.0
        self._alike = True  # in what is finite, and in the rest

    def add(self, value: Tensor, reference: Tensor) -> None:
        for part in _parts(reference):
            a, b = wide(value[part]), wide(reference[part])
            finite = b.isfinite()
            if finite.all() and a.isfinite().all():  # as almost always: nothing has to be picked out
                self._difference = max(self._difference, _largest(a - b))
                self._scale = max(self._scale, _largest(b))
                continue
            rest = torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
            self._alike = self._alike and torch.equal(a.isfinite(), finite) and rest
            if self._alike and finite.any():
                self._difference = max(self._difference, _largest((a - b)[finite]))
                self._scale = max(self._scale, _largest(b[finite]))

    @property
    def relative(self) -> float:
        """Infinite where one is finite and the other is not."""
        if not self._alike or (self._difference and not self._scale):
            return math.inf
        return self._difference / self._scale if self._scale else 0.0


def _largest(values: Tensor) -> float:
    """The largest absolute value."""
    least, most = values.aminmax()
    return max(-float(least), float(most))


class Predictions:
    """Scores [N, C] of a converted model against those of the dense one, each a distribution by softmax."""

    def __init__(self) -> None:
        self.rows = 0
        self._divergence = self._agreed = 0.0
        self._losses = [0.0, 0.0]  # of the dense model and of the converted one
        self._targets = 0

    def add(self, scores_NC: Tensor, dense_NC: Tensor, targets_N: Tensor | None = None) -> None:
        """``targets_N`` are the classes that were right, where they are known."""
        self.rows += len(dense_NC)
        self._targets += 0 if targets_N is None else len(targets_N)
        for part in _parts(dense_NC):
            dense, scores = (wide(logits[part]).log_softmax(1) for logits in (dense_NC, scores_NC))
            terms = dense.exp() * (dense - scores)
            self._divergence += float(terms.where(dense != -math.inf, 0.0).sum())
            self._agreed += float((dense.argmax(1) == scores.argmax(1)).sum())
            if targets_N is not None:
                for side, logs in enumerate((dense, scores)):
                    self._losses[side] -= float(logs.gather(1, targets_N[part, None].long()).sum())

    @property
    def divergence(self) -> float:
        """Mean of KL(dense || converted), in nats."""
        return self._divergence / self.rows

    @property
    def agreement(self) -> float:
        """Share of rows in which the most probable class is the same."""
        return self._agreed / self.rows

    @property
    def perplexities(self) -> tuple[float, float] | None:
        """exp of the mean cross entropy, of the dense model and of the converted one; None without targets."""
        if not self._targets:
            return None
        dense, converted = (float(torch.tensor(one / self._targets).double().exp()) for one in self._losses)
        return dense, converted


class ExpertLoad:
    """How often each expert is chosen: the slots of a router that sends each of N tokens to at most K experts."""

    def __init__(self, experts: int) -> None:
        self._slots_E = torch.zeros(experts, dtype=torch.float64)

    def add(self, experts_NK: Tensor) -> None:
        experts = len(self._slots_E)  # the number of no expert too, see ir.no_expert
        self._slots_E += torch.bincount(experts_NK.flatten().cpu(), minlength=experts)[:experts]

    @property
    def share(self) -> list[float]:
        """Of all slots, by expert."""
        return (self._slots_E / self._slots_E.sum()).tolist()

    @property
    def entropy(self) -> float:
        """Entropy of the shares over that of equal ones: 1 is balanced, 0 is one expert for all."""
        if len(self._slots_E) == 1:
            return 1.0
        share_E = torch.tensor(self.share, dtype=torch.float64)
        return -float(torch.special.xlogy(share_E, share_E).sum()) / math.log(len(share_E))

    @property
    def variation(self) -> float:
        """Standard deviation of the loads over their mean."""
        return float(self._slots_E.std(correction=0) / self._slots_E.mean())

    @property
    def peak(self) -> float:
        """The largest load over the mean."""
        return float(self._slots_E.max() / self._slots_E.mean())
