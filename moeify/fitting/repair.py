"""The down projections of a split block fitted to the dense block's output, the routing as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moeify.fitting.mixture import Mixture
from moeify.fitting.ridge import NormalEquations

UNITS = 0.3  # ridge of a hidden unit's column, over the geometric mean of its own and the average square sum
BIASES = 0.02  # of an expert's bias, over its own square sum
_LEAST = 1e-6  # of what is left nearly free, over the square sum

Rows = Iterable[tuple[Tensor, Tensor]]  # some rows at a time: h [N, F] and gates [N, E]


def unknowns(mixture: Mixture) -> int:
    """For each output: a weight per hidden unit, a bias per expert and the output bias, where the block has them."""
    biases = 0 if mixture.down_bias_ED is None else mixture.experts
    return len(mixture.expert_F) + biases + (mixture.output_bias_D is not None)


def repair(mixture: Mixture, rows: Rows, whole: Callable[[Tensor], Tensor]) -> Mixture:
    """The mixture with new down projections and, of those that it has, biases.

    ``argmin_W sum over rows |y - z W|^2 + sum_u l_u |W_u - W0_u|^2`` with z = (hidden units times their gate, gates,
    1), y = ``whole(h)`` the dense block's output, and W0 the weights as they are. The unknown is W - W0, so nothing
    changes where the mixture is the dense block already. The gates stay what they are.

    The ridge l holds what the rows do not determine at W0, so that fewer rows than unknowns are no error. It is
    ``UNITS sqrt(s_u mean(s))`` with s_u the square sum of column u over the rows: an unregularised fit to as few rows
    as are affordable here follows their noise.
    """
    device = mixture.down_DF.device
    equations = NormalEquations(unknowns(mixture), len(mixture.down_DF), device)
    for h_NF, gates_NE in rows:
        columns = [h_NF * mixture.per_unit(gates_NE)]
        if mixture.down_bias_ED is not None:
            columns.append(gates_NE)
        if mixture.output_bias_D is not None:
            columns.append(gates_NE.new_ones(len(gates_NE), 1))
        equations.add(torch.cat(columns, 1), whole(h_NF) - mixture.output(h_NF, gates_NE))
    change_UD = equations.solve(_ridge(equations.gram_UU.diagonal(), mixture)).float()
    units = len(mixture.expert_F)
    down_bias_ED, output_bias_D = mixture.down_bias_ED, mixture.output_bias_D
    return dataclasses.replace(
        mixture,
        down_DF=mixture.down_DF + change_UD[:units].t(),
        down_bias_ED=None if down_bias_ED is None else down_bias_ED + change_UD[units : units + mixture.experts],
        output_bias_D=None if output_bias_D is None else output_bias_D + change_UD[-1],
    )


def _ridge(squares_U: Tensor, mixture: Mixture) -> Tensor:
    units = squares_U[: len(mixture.expert_F)]
    mean = units.mean()
    ridge_U = torch.cat([UNITS * (units * mean).sqrt(), BIASES * squares_U[len(units) :]]) + _LEAST * mean
    if mixture.output_bias_D is not None:
        ridge_U[-1] = _LEAST * squares_U[-1]  # one number for each output, and all rows say what it is
    return ridge_U
