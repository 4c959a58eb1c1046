"""How likely a model finds outputs that are drawn from its own predictions.

The gradient of that log-likelihood says what an error inside the model does to what it predicts: with labels drawn from
the model itself, the mean of ``1/2 (g . delta)^2`` is the second-order term of the Kullback-Leibler divergence from the
model to the disturbed one (g g^T averages to the Fisher information; Amari, Natural gradient works efficiently in
learning, Neural Computation 10, 1998). One idea for every kind of output, by what it is taken to predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.fitting.objective import Objective
from moeify.ir.program import flat

_ROWS = 256  # of scores, which may be as wide as a vocabulary, of which probabilities are in memory


@dataclass(frozen=True)
class Predicted:
    """One output of a program, ``position`` in pytree order, and the distribution it stands for.

    | kind | distribution of a row | the loss that follows |
    |---|---|---|
    | scores [..., C] | one of C classes, by softmax | KL divergence in nats |
    | directions [..., C] | normal of variance 1 around the row over its length | 1 - cosine |
    | values | normal of variance 1 around the value over the root mean square | half the relative square error |

    ``mask`` is the position of the input that is zero where a row is padding.
    """

    position: int
    kind: Literal["scores", "directions", "values"]
    mask: int | None = None


def drawn_likelihood(outputs: Sequence[Predicted], generator: torch.Generator) -> Objective:
    """The log-likelihood of labels drawn from the outputs, each output's divided by the square root of its rows.

    So the squared gradients of a batch add up to a mean over rows of each output, and outputs whose labels are drawn
    independently add up too.
    """

    def objective(output: Any, inputs: Sequence[Tensor]) -> Tensor:
        values = flat(output)
        total = torch.zeros(())
        for one in outputs:
            value = values[one.position].float()
            rows = value.reshape(-1, 1) if one.kind == "values" else value.flatten(0, -2)
            on = None if one.mask is None else inputs[one.mask].flatten() != 0
            if on is not None and not on.all():  # scores may take a gigabyte, and this copies them
                rows = rows[on]
            total = total + _log_likelihood(rows, one.kind, generator) / math.sqrt(max(1, len(rows)))
        return total

    return objective


def _log_likelihood(rows_NC: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    if kind == "scores":
        parts = rows_NC.detach().split(_ROWS)
        labels_N = torch.cat([torch.multinomial(part.softmax(1), 1, generator=generator)[:, 0] for part in parts])
        return -F.cross_entropy(rows_NC, labels_N, reduction="sum")
    if kind == "directions":
        means = F.normalize(rows_NC, dim=1)
    else:
        means = rows_NC / rows_NC.detach().square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    # Of a label y = mean + noise the gradient of -|y - mean|^2 / 2 is that of noise . mean.
    return (torch.randn(means.shape, generator=generator) * means).sum()
