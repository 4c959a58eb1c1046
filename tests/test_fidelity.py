"""Measures that are added up batch by batch are those of all rows at once, written another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moeify.ir.difference import relative_error
from moeify.verify import fidelity
from moeify.verify.fidelity import LargestError, RowErrors

INF, NAN = math.inf, math.nan
# Of five rows of three: what stands in the value and in the reference at one place.
PLACES = {
    "finite": (1.5, -4.0),
    "both infinite": (INF, INF),
    "both minus infinite": (-INF, -INF),
    "both no number": (NAN, NAN),
    "of two signs": (INF, -INF),
    "one infinite": (INF, 1.0),
    "the other infinite": (1.0, INF),
    "one no number": (NAN, 1.0),
}


def drawn() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    reference = torch.randn(5, 3, generator=draw)
    return reference + 0.1 * torch.randn(5, 3, generator=draw), reference


@pytest.mark.parametrize("place", PLACES)
def test_the_largest_error_is_that_of_all_values(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_VALUES", 3)  # a row at a time
    value, reference = drawn()
    value[2, 1], reference[2, 1] = PLACES[place]
    measure = LargestError()
    measure.add(value[:2], reference[:2])
    measure.add(value[2:], reference[2:])
    assert measure.relative == pytest.approx(relative_error(value, reference), rel=1e-12)


def test_row_errors_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_VALUES", 6)  # two rows at a time
    value, reference = drawn()
    value[1] = reference[1] = 0.0  # the same: alike, though without a direction
    value[3] = 0.0  # another than the reference: not alike at all
    measure = RowErrors()
    measure.add(value[:3], reference[:3])
    measure.add(value[3:], reference[3:])
    a, b = value.double(), reference.double()
    assert measure.rows == 5
    assert measure.rms_error == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-12)
    cosine = torch.cosine_similarity(a, b)
    cosine[1] = 1.0
    assert measure.cosine == pytest.approx(float(cosine.mean()), rel=1e-12)
