"""What tuning decides by: expected losses against measured ones, the frontier against every allocation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeify.errors import BadRecipe, Refused
from moeify.ir.block import Block
from moeify.ir.hidden import hidden
from moeify.ir.profile import BlockProfile
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.tuning import pruning
from moeify.tuning.allocation import groups_of
from moeify.tuning.choices import Choice, choices, flops
from moeify.tuning.frontier import Option, frontier
from moeify.tuning.gradients import Sensitivity, sensitivities
from moeify.tuning.likelihood import Predicted, drawn_likelihood
from moeify.tuning.recipes import recipe_of
from moeify.tuning.walk import Walk
from tests import programs
from tests.profiles import profiled, statistics

KINDS = ("scores", "directions", "values")


class Disturbed(fx.Interpreter):
    """A program whose block output is off by ``error``."""

    def __init__(self, program: Program, block: Block, error: Tensor) -> None:
        super().__init__(program.graph_module)
        self._at, self._error = block.calls[0].output, error

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return value + self._error if n.name == self._at else value


def true_loss(kind: str, value: Tensor, dense: Tensor) -> float:
    """By the definition in ``likelihood.Predicted``."""
    if kind == "scores":
        return float(F.kl_div(value.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum")) / 1280
    if kind == "directions":
        return float(1 - F.cosine_similarity(value, dense, dim=-1).mean())
    return float((value - dense).square().mean() / dense.square().mean() / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_loss_is_the_measured_one(kind: str) -> None:
    program = programs.plain(2)
    ids = torch.randint(40, (256, 5), generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    block = program.blocks[0]
    error = 0.02 * torch.randn(256, 5, programs.D, generator=draw)
    with torch.no_grad():
        dense = program.graph_module(ids).double()
        disturbed = Disturbed(program, block, error).run(ids).double()
    wanted = true_loss(kind, disturbed, dense)
    objective = drawn_likelihood([Predicted(0, kind)], draw)
    found = [
        sensitivities(program, [(ids,)], objective)[block.anchor].expected_loss(error.flatten(0, 1)) for _ in range(20)
    ]
    # 20 draws of 1280 rows with (g.e)^2 like a chi-squared, relative deviation sqrt(2 / 25600) = 1 %, and the third
    # order of errors that are 2 % of what they are added to.
    assert sum(found) / 20 == pytest.approx(wanted, rel=0.06)


def test_batches_are_averaged() -> None:
    program = programs.plain(1)
    ids = torch.randint(40, (8, 5), generator=torch.Generator().manual_seed(1))
    objective = drawn_likelihood([Predicted(0, "scores")], torch.Generator().manual_seed(3))
    one = sensitivities(program, [(ids,)], objective)[program.blocks[0].anchor]
    objective = drawn_likelihood([Predicted(0, "scores")], torch.Generator().manual_seed(3))
    two = sensitivities(program, [(ids,), (ids,)], objective)[program.blocks[0].anchor]
    assert two.inputs_ND.shape == (80, programs.D)
    torch.testing.assert_close(two.gradients_ND[:40] * 2**0.5, one.gradients_ND)


def test_nothing_to_lose_is_refused() -> None:
    program = programs.plain(1)
    with pytest.raises(Refused, match="NaN, infinite or zero"):
        sensitivities(program, [program.example], lambda output, inputs: output.sum() * 0.0)


def test_pruning_is_ridge_regression() -> None:
    """Every width against its own normal equations, solved from scratch."""
    program = programs.gated(1)
    block, read = program.blocks[0], program.parameter
    profile = statistics(block, read)
    draw = torch.Generator().manual_seed(4)
    sensitivity = Sensitivity(torch.randn(30, block.d_model, generator=draw), torch.randn(30, 8, generator=draw))
    widths = [18, 7, 1]
    found = pruning.losses(block, read, profile, sensitivity, widths)
    with torch.no_grad():
        h = hidden(block, read, profile.inputs_ND).double() - profile.mean_F
        down = read(block.down.parameter).double()
        energy = h.square() * down.square().sum(0)
        order = (energy / energy.sum(1, keepdim=True)).mean(0).argsort(descending=True)
        new = hidden(block, read, sensitivity.inputs_ND).double() - profile.mean_F
        squares = h.square().sum(0)
        for width, loss in zip(widths, found, strict=True):
            kept = order[:width]
            ridge = 0.3 * (squares[kept] * squares.mean()).sqrt() + 1e-6 * squares.mean()
            left = h @ down.t() - h[:, kept] @ down[:, kept].t()
            change = torch.linalg.solve(h[:, kept].t() @ h[:, kept] + ridge.diag(), h[:, kept].t() @ left)
            error = new[:, kept] @ (down[:, kept].t() + change) - new @ down.t()
            assert loss == pytest.approx(sensitivity.expected_loss(error), rel=1e-4)  # of float32 hidden values


def test_frontier_against_every_allocation() -> None:
    draw = torch.Generator().manual_seed(5)
    groups = []
    for number in range(4):
        costs = (torch.rand(5, generator=draw) + 1).cumsum(0).flip(0).tolist()
        losses = [0.0, *(torch.rand(4, generator=draw) ** (number + 1)).cumsum(0).tolist()]
        groups.append([Option(loss, cost) for loss, cost in zip(losses, costs)])
    every = [
        (sum(option.loss for option in chosen), sum(option.cost for option in chosen))
        for chosen in itertools.product(*groups)
    ]
    points = frontier(groups)
    assert points[0].options == (0, 0, 0, 0)
    assert points[-1].cost == pytest.approx(min(cost for _, cost in every))
    for point in points:
        chosen = [groups[group][option] for group, option in enumerate(point.options)]
        assert point.loss == pytest.approx(sum(option.loss for option in chosen))
        assert point.cost == pytest.approx(sum(option.cost for option in chosen))
        assert point.loss <= min(loss for loss, cost in every if cost <= point.cost + 1e-9) + 1e-9
        assert point.cost <= min(cost for loss, cost in every if loss <= point.loss + 1e-9) + 1e-9
    assert [point.cost for point in points] == sorted((point.cost for point in points), reverse=True)
    assert len(points) > 6


def test_choices_follow_the_firing() -> None:
    (block,) = programs.plain(1).blocks
    profile = statistics(block, programs.plain(1).parameter)
    gelu = choices([block], [profile], 16)
    assert gelu[0] == Choice(12, 12)  # of 24 hidden units
    assert [choice.active for choice in gelu] == [12, 10, 8, 6, 4, 2]
    assert gelu[3] == Choice(12, 6, experts=7, top_k=1, shared=5)
    assert gelu[3].width(block) == 12
    assert flops(block, gelu[3], [2, 3]) == 5 * (block.flops_per_token / 2 + 2 * 8 * 7)
    sparse = BlockProfile(**{**vars(profile), "active_F": profile.active_F * 0.1})
    assert choices([block], [sparse], 16)[3] == Choice(12, 6, experts=9, top_k=3, shared=3)


def test_blocks_that_cannot_be_cut_are_refused() -> None:
    program = profiled(programs.custom(pointwise=False))
    with pytest.raises(Refused) as error:
        groups_of(program, program.profile, 16)
    assert error.value.what == "none of the feed-forward blocks can be split"
    assert "normalised over its whole width" in str(error.value)


def test_recipe_leaves_blocks_dense_and_goes_to_toml_and_back(tmp_path) -> None:
    two, four = Choice(16, 8, 9, 1, 7), Choice(16, 4, 13, 1, 3)
    made = recipe_of(Recipe(seed=3, include=("sample",)), {"a": two, "b": Choice(16, 16), "c": four, "d": two}, 900)
    assert made.blocks == "a,c,d"
    assert (made.experts, made.top_k, made.shared, made.tokens, made.seed) == (9, 1, 7, 900, 3)
    assert made.for_block("c").experts == 13
    assert made.for_block("c").method == "split-energy"
    path = tmp_path / "r.toml"
    path.write_text(made.to_toml())
    assert Recipe.from_toml(path) == made
    odd = Recipe(method='a"\\{x=1}', repair=False, overrides=(("b.*", {"shared": 2, "repair": True}),))
    path.write_text(odd.to_toml())
    assert Recipe.from_toml(path) == odd
    with pytest.raises(BadRecipe, match="tokens is '9'"):
        Recipe(tokens="9")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("truth", "tries", "met", "measured"), [(1.0, 3, 4, [4]), (2.0, 3, 1, [4, 1]), (9.0, 2, None, [4, 0])]
)
def test_walk_learns_from_what_it_measures(truth: float, tries: int, met: int | None, measured: list[int]) -> None:
    predicted = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    walk = Walk(predicted, bound=5.0)
    assert walk.run(lambda at: truth * predicted[at], tries, lambda at, later: True) == met
    assert list(walk.measured) == measured


def test_walk_goes_on_where_less_is_lost_than_expected() -> None:
    walk = Walk([1.0, 2.0, 3.0, 4.0], bound=1.0)
    assert walk.run(lambda at: 0.3 * (at + 1), 4, lambda at, later: True) == 2
    assert list(walk.measured) == [0, 2]
    savings = Walk([-0.4, -0.3, -0.2, -0.1], bound=-0.15)  # three quarters of what is expected
    assert savings.run(lambda at: 0.75 * savings.predicted[at], 4, lambda at, later: True) == 2
    assert list(savings.measured) == [2]
    savings = Walk([-0.4, -0.3, -0.2, -0.1], bound=-0.2)
    assert savings.run(lambda at: 0.75 * savings.predicted[at], 4, lambda at, later: True) == 1
    assert list(savings.measured) == [2, 1]
    walk = Walk([1.0, 2.0], bound=1.0)
    assert walk.run(lambda at: float("nan"), 4, lambda at, later: True) is None
