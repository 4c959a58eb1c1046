"""Routers of split blocks fitted to which experts matter for a token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.fitting.ridge import NormalEquations
from moeify.nn.routers.topk_scores import LinearTopK, MlpTopK, NeuronTopK, TopKRouter

_RIDGE = 1e-3  # over the square sum of an input, so that the scales of inputs do not matter
_QUIET = 1e-4  # an input that varies by less, over the mean of all, counts as one that varies by so much
_BATCH = 256
_EPOCHS = 4
_STEPS = 1000  # at the least, where there are few rows
_RATE = 3e-3
_RELATIVE_RATE = 0.03  # over the size of a parameter, of rows that start from the block's own


def fit_router(router: TopKRouter, how: str, x_ND: Tensor, sizes_NE: Tensor, generator: torch.Generator) -> None:
    """Fit the scores, in place, to rows x of the block's input and the size of each expert's output there.

    ``regress``: the scores are to be the sizes, by squared error, as in D2DMoE (arXiv 2310.04361); each token's sizes
    are scaled to a square sum of 1, or the few tokens of very large values would decide alone. ``classify``: a softmax
    over the scores is to choose the ``top_k`` largest, by cross entropy, as in MoEfication (arXiv 2110.01786).

    A linear score is regressed in closed form; everything else is trained by Adam, the linear score from there, the
    others from where they are. Deterministic by the state of ``generator``.
    """
    target_NE = F.normalize(sizes_NE, dim=1)
    if isinstance(router, LinearTopK):
        _regress(router, x_ND, target_NE)
        if how == "regress":
            return
    if how == "classify":
        target_NE = largest(sizes_NE, router.top_k) / router.top_k
    with torch.enable_grad():
        _train(router, how, x_ND, target_NE, generator)


def largest(sizes_NE: Tensor, top_k: int) -> Tensor:
    """1 where an expert is among the row's ``top_k`` largest, 0 elsewhere."""
    return torch.zeros_like(sizes_NE).scatter_(1, sizes_NE.topk(top_k, 1).indices, 1.0)


def _regress(router: LinearTopK, x_ND: Tensor, target_NE: Tensor) -> None:
    mean_D, mean_E = x_ND.mean(0), target_NE.mean(0)
    equations = NormalEquations(x_ND.shape[1], target_NE.shape[1], x_ND.device)
    for x, target in zip(x_ND.split(_BATCH), target_NE.split(_BATCH)):
        equations.add(x - mean_D, target - mean_E)
    squares_D = equations.gram_UU.diagonal()
    least = float(_QUIET**2 * squares_D.mean()) or 1.0
    weight_DE = equations.solve(_RIDGE * squares_D.clamp_min(least)).float()
    with torch.no_grad():
        router.weight.copy_(weight_DE.t())
        router.bias.copy_(mean_E - mean_D @ weight_DE)


def _train(router: TopKRouter, how: str, x_ND: Tensor, target_NE: Tensor, generator: torch.Generator) -> None:
    mean_D, deviation_D = x_ND.mean(0), x_ND.std(0, correction=0)
    least = float(_QUIET * deviation_D.square().mean().sqrt()) or 1.0
    deviation_D = deviation_D.clamp_min(least)
    mean_E, deviation = target_NE.mean(0), target_NE.std(correction=0)
    rows_are_fixed = isinstance(router, NeuronTopK)  # they come from the block, and see x as it is
    scale, rate = 1.0, _RATE
    with torch.no_grad():
        if not isinstance(router, MlpTopK):
            scale = float(router.scores(x_ND).std()) or 1.0  # what the scores start from has a size of its own
        if rows_are_fixed:
            rate = _RELATIVE_RATE * max(float(value.square().mean().sqrt()) for value in router.parameters())
        else:
            x_ND = (x_ND - mean_D) / deviation_D
            _shift(router, mean_D, deviation_D)
            if how == "regress":
                target_NE = (target_NE - mean_E) / deviation
    steps = max(_STEPS, _EPOCHS * math.ceil(len(x_ND) / _BATCH))
    optimiser = torch.optim.Adam(router.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(len(x_ND), generator=generator)
        which, order = order[:_BATCH], order[_BATCH:]
        scores, target = router.scores(x_ND[which]), target_NE[which]
        if how == "classify":
            loss = F.cross_entropy(scores / scale, target)
        else:
            # The size of a neuron score says nothing: it is compared with those of the other experts.
            loss = F.mse_loss(F.normalize(scores, dim=1) if rows_are_fixed else scores, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    if rows_are_fixed:
        return
    with torch.no_grad():
        if how == "regress":
            last = router.get_parameter("weight"), router.get_parameter("bias")
            last[0].mul_(deviation)
            last[1].mul_(deviation).add_(mean_E)
        _shift(router, -mean_D / deviation_D, 1 / deviation_D)


def _shift(router: TopKRouter, mean_D: Tensor, deviation_D: Tensor) -> None:
    """Let a router of x be the same router of (x - mean) / deviation."""
    first = ("up", "up_bias") if isinstance(router, MlpTopK) else ("weight", "bias")
    weight, bias = (router.get_parameter(name) for name in first)
    bias.add_(weight @ mean_D)
    weight.mul_(deviation_D)
