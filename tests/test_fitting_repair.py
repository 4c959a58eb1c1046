"""The repair of down projections against numpy's least squares, and the mixture it works on."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from moeify.errors import Refused
from moeify.experts.planning import plan_block
from moeify.fitting.mixture import Mixture
from moeify.fitting.repair import repair, unknowns
from moeify.fitting.ridge import NormalEquations
from moeify.ir.hidden import hidden
from moeify.pipeline.default import REWRITE
from moeify.pipeline.runner import run
from tests import profiles
from tests.test_make_experts import MAKERS

KINDS = [kind for kind in MAKERS if kind not in ("custom-norm",)]


def mixture_of(kind: str, method: str = "carve", shared: int = 1):
    """(mixture, dense block's output as a function of x) of a block split into parts of 6 hidden units."""
    made = MAKERS[kind](method=method, experts=4 - shared, top_k=1, shared=shared, shared_gate=False)
    profiles.profiled(made)
    block = made.blocks[0]
    read = {name: value.detach().clone() for name, value in made.graph_module.named_parameters(remove_duplicate=False)}
    plan = plan_block(made, block)
    run(made, REWRITE)
    made.materialise()

    def dense(x: Tensor) -> Tensor:
        y = hidden(block, read.__getitem__, x) @ block.down.read(read[block.down.parameter]).t()
        return y if block.down_bias is None else y + block.down_bias.read(read[block.down_bias.parameter])

    with torch.no_grad():
        return Mixture.of(block, plan, made.parameter), dense


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def gates_of(x: Tensor, experts: int) -> Tensor:
    """One expert a token, by a rule of its own."""
    return torch.nn.functional.one_hot((x[:, 0] * 7).long().abs() % experts, experts).float()


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_gates_on_is_the_dense_block(kind, shared):
    mixture, dense = mixture_of(kind, shared=shared)
    x = rows(20)
    h = mixture.hidden(x)
    torch.testing.assert_close(mixture.output(h, torch.ones(20, mixture.experts)), dense(x), rtol=1e-4, atol=1e-5)
    off = torch.ones(20, mixture.experts)
    off[:, 1] = 0
    left_out = mixture.output(h, torch.ones_like(off)) - mixture.output(h, off)
    torch.testing.assert_close(mixture.sizes(h)[:, 1], left_out.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["carve", "carve{compensate=false}"])
@pytest.mark.parametrize("kind", ["plain", "gated"])
@torch.no_grad()
def test_repair_is_the_least_squares_of_numpy(kind, method):
    """The ridge as further rows of the system, in float64."""
    mixture, dense = mixture_of(kind, method)
    x = rows(90)
    h, gates, y = mixture.hidden(x), gates_of(x, mixture.experts), dense(x)
    z = [h * mixture.per_unit(gates)]
    start = [mixture.down_DF.t()]
    if mixture.down_bias_ED is not None:
        z, start = [*z, gates], [*start, mixture.down_bias_ED]
    if mixture.output_bias_D is not None:
        z, start = [*z, torch.ones(90, 1)], [*start, mixture.output_bias_D[None]]
    z, start = torch.cat(z, 1).double().numpy(), torch.cat(start).double().numpy()
    squares = (z**2).sum(0)
    mean = squares[:24].mean()
    ridge = numpy.concatenate([0.3 * numpy.sqrt(squares[:24] * mean), 0.02 * squares[24:]]) + 1e-6 * mean
    if mixture.output_bias_D is not None:
        ridge[-1] = 1e-6 * squares[-1]
    strength = numpy.sqrt(ridge)[:, None]
    system = numpy.concatenate([z, numpy.diag(strength[:, 0])])
    wanted = numpy.linalg.lstsq(system, numpy.concatenate([y.double().numpy(), strength * start]), rcond=None)[0]
    pieces = [(h[i : i + 40], gates[i : i + 40]) for i in range(0, 90, 40)]
    made = repair(mixture, pieces, lambda h: mixture.output(h, torch.ones(len(h), mixture.experts)))
    assert len(wanted) == unknowns(mixture)
    got = [made.down_DF.t(), *([] if made.down_bias_ED is None else [made.down_bias_ED])]
    got += [] if made.output_bias_D is None else [made.output_bias_D[None]]
    numpy.testing.assert_allclose(torch.cat(got).numpy(), wanted, rtol=1e-4, atol=1e-5)  # stored in float32


@torch.no_grad()
def test_what_is_the_dense_block_already_stays():
    mixture, _ = mixture_of("plain")
    h = mixture.hidden(rows(60))
    made = repair(mixture, [(h, torch.ones(60, mixture.experts))], lambda h: mixture.output(h, torch.ones(len(h), 3)))
    assert torch.equal(made.down_DF, mixture.down_DF)


@torch.no_grad()
def test_fewer_rows_than_unknowns_change_only_what_they_tell():
    mixture, dense = mixture_of("plain")
    x = rows(10)
    assert unknowns(mixture) > 10
    h, gates = mixture.hidden(x), gates_of(x, mixture.experts)
    gates[:, 2] = 0
    made = repair(mixture, [(h, gates)], lambda h: dense(x))
    off = mixture.expert_F == 2
    assert torch.equal(made.down_DF[:, off], mixture.down_DF[:, off])
    assert torch.equal(made.down_bias_ED[2], mixture.down_bias_ED[2])
    assert not torch.equal(made.down_DF[:, ~off], mixture.down_DF[:, ~off])


def test_normal_equations_refuse_what_is_no_number():
    equations = NormalEquations(2, 1, torch.device("cpu"))
    equations.add(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 1))
    with pytest.raises(Refused, match="have no solution"):
        equations.solve(torch.ones(2))
