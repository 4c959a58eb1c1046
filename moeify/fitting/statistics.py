"""Statistics of one block's hidden value, summed as rows come: in float32 over a few, in float64 over all."""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.fitting.reservoir import Reservoir
from moeify.ir.profile import BlockProfile


class Statistics:
    """``firing`` counts a row's ``top`` largest |h|; ``inputs`` samples the rows of the block's input."""

    def __init__(self, units: int, top: int, inputs: Reservoir) -> None:
        self.inputs = inputs
        self.tokens = 0
        self._top = top
        self._quarter = max(1, units // 4)
        names = ("mean", "absolute", "square", "active", "firing", "importance")
        self._sums = {name: torch.zeros(units, dtype=torch.float64) for name in names}
        self._top_quarter = 0.0
        self._with_gradients = False

    def add(self, h_NF: Tensor, gradient_NF: Tensor | None) -> None:
        """Some rows of h in float32, and of dL/dh where it is wanted. At most a few thousand: they are summed so."""
        self.tokens += len(h_NF)
        absolute, square = h_NF.abs(), h_NF.square()
        largest = absolute.topk(max(self._top, self._quarter), dim=1)  # sorted: the first `top` are the top ones
        # Where fewer units are active than are looked for, the rest of the largest are zeros, which do not fire.
        fired = largest.indices[:, : self._top][largest.values[:, : self._top] > 0]
        firing = torch.bincount(fired, minlength=h_NF.shape[1])
        added = {
            "mean": h_NF.sum(0),
            "absolute": absolute.sum(0),
            "square": square.sum(0),
            "active": (h_NF != 0).sum(0),
            "firing": firing,
        }
        if gradient_NF is not None:
            self._with_gradients = True
            added["importance"] = (h_NF * gradient_NF).abs_().sum(0)
        for name, value in added.items():
            self._sums[name] += value.cpu()
        whole = square.sum(1)
        part = largest.values[:, : self._quarter].square().sum(1)
        # A row in which no unit is active has no share: it counts as 1, being all in its top quarter.
        self._top_quarter += float(torch.where(whole > 0, part / whole, 1.0).sum())

    def finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return all(bool(value.isfinite().all()) for value in self._sums.values())

    def profile(self) -> BlockProfile:
        """What has come so far, at least one row."""
        means = {name: (value / self.tokens).float() for name, value in self._sums.items()}
        return BlockProfile(
            tokens=self.tokens,
            mean_F=means["mean"],
            mean_abs_F=means["absolute"],
            mean_square_F=means["square"],
            active_F=means["active"],
            firing_F=means["firing"],
            importance_F=means["importance"] if self._with_gradients else None,
            inputs_ND=self.inputs.sample(),
            top_quarter=self._top_quarter / self.tokens,
        )
