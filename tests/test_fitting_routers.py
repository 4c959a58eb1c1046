"""Routers fitted to sizes of experts' outputs."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.fitting.routers import fit_router, largest
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.topk_scores import TopKRouter
from tests import programs

D, E = 8, 4


def rows(count: int, seed: int) -> Tensor:
    # Features of very different scale and mean, as the residual stream of a language model has them.
    scale = torch.tensor([0.01, 0.1, 1.0, 1.0, 1.0, 1.0, 10.0, 30.0])
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) * scale + scale


def drawn(text: str, top_k: int) -> TopKRouter:
    router = ROUTERS.parse(text).for_block(programs.gated().blocks[0]).build(D, E, top_k, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    router.reset(generator)
    if "neuron" in text:
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.normal_(generator=generator)
    return router


def fitted(text: str, how: str, x: Tensor, sizes: Tensor, top_k: int = 1, seed: int = 2) -> TopKRouter:
    router = drawn(text, top_k)
    fit_router(router, how, x, sizes, torch.Generator().manual_seed(seed))
    return router


def agreement(router: TopKRouter, x: Tensor, sizes: Tensor) -> float:
    with torch.no_grad():
        chosen = largest(router.scores(x), router.top_k)
    return float((chosen * largest(sizes, router.top_k)).sum()) / (len(x) * router.top_k)


def separable(x: Tensor) -> Tensor:
    """Sizes of which a linear function of x knows the order."""
    weight = torch.randn(E, D, generator=torch.Generator().manual_seed(3))
    return 5 + ((x - x.mean(0)) / x.std(0)) @ weight.t() * 0.2


@pytest.mark.parametrize("how", ["regress", "classify"])
@pytest.mark.parametrize("text", ["topk", "topk{score=mlp,hidden=16}"])
def test_a_separable_choice_is_found(text, how):
    x, sizes = rows(1500, 0), separable(rows(1500, 0))
    assert agreement(drawn(text, 1), x, sizes) < 0.6
    # Sizes are scaled token by token, so that the best linear function is not quite exact.
    assert agreement(fitted(text, how, x[:1200], sizes[:1200]), x[1200:], sizes[1200:]) > 0.9


@pytest.mark.parametrize("how", ["regress", "classify"])
def test_what_a_line_cannot_tell_apart_a_second_layer_can(how):
    x = rows(2000, 0)
    z = (x - x.mean(0)) / x.std(0)
    sizes = torch.stack([z[:, 2].abs(), z[:, 3].abs(), torch.full((2000,), 0.8), torch.full((2000,), 0.1)], 1)
    line, layers = (fitted(text, how, x[:1600], sizes[:1600]) for text in ("topk", "topk{score=mlp,hidden=32}"))
    assert agreement(layers, x[1600:], sizes[1600:]) > agreement(line, x[1600:], sizes[1600:]) + 0.1


@pytest.mark.parametrize("how", ["regress", "classify"])
def test_rows_of_hidden_units_are_trained_from_where_they_are(how):
    teacher = drawn("topk{score=neuron,representatives=2}", 1)
    x = torch.randn(1500, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sizes = teacher.scores(x)
    noisy = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    before = agreement(noisy, x[1200:], sizes[1200:])
    fit_router(noisy, how, x[:1200], sizes[:1200], torch.Generator().manual_seed(2))
    assert agreement(noisy, x[1200:], sizes[1200:]) > max(0.85, before + 0.05)


def test_the_linear_regression_is_that_of_numpy():
    """Centred, with a ridge of 1e-3 of an input's square sum, bias free; targets of length 1."""
    x, sizes = rows(300, 0), rows(300, 5)[:, :E].abs()
    router = fitted("topk", "regress", x, sizes)
    centred = (x - x.mean(0)).double().numpy()
    target = F.normalize(sizes, dim=1).double().numpy()
    system = numpy.concatenate([centred, numpy.diag(numpy.sqrt(1e-3 * (centred**2).sum(0)))])
    wanted = numpy.linalg.lstsq(system, numpy.concatenate([target - target.mean(0), numpy.zeros((D, E))]), rcond=None)
    numpy.testing.assert_allclose(router.weight.detach().numpy(), wanted[0].T, rtol=1e-3, atol=1e-6)  # float32 rows
    bias = target.mean(0) - x.double().numpy().mean(0) @ wanted[0]
    numpy.testing.assert_allclose(router.bias.detach().numpy(), bias, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("text", ["topk", "topk{score=mlp,hidden=8}", "topk{score=neuron}"])
@pytest.mark.parametrize("how", ["regress", "classify"])
def test_the_fit_depends_on_the_seed_alone(text, how):
    x, sizes = rows(300, 0), rows(300, 5)[:, :E].abs()
    first, second, third = (fitted(text, how, x, sizes, seed=seed) for seed in (2, 2, 3))
    alike = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(alike)
    same = all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))
    assert same == (text == "topk" and how == "regress")  # in closed form nothing is drawn


def test_dynamic_k_takes_the_experts_that_are_nearly_as_large_as_the_largest():
    """Fitted, it agrees with the rule on the true sizes, and how many experts a token has varies."""
    x = rows(1500, 0)
    sizes = separable(x)
    router = fitted("dynamic-k{tau=0.15,score=mlp,hidden=16}", "regress", x[:1200], sizes[:1200], top_k=E)
    experts, _ = router(x[1200:])
    taken = torch.zeros(300, E + 1).scatter_(1, experts, 1.0)[:, :E]
    wanted = (sizes[1200:] >= 0.85 * sizes[1200:].amax(1, keepdim=True)).float()
    assert len(wanted.sum(1).unique()) > 2
    assert float((taken == wanted).float().mean()) > 0.9
