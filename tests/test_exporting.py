"""A Program for the backends: eval mode, no noise, dynamic sizes, and the user's Program as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from moeify.backends.exporting import drop_router_noise, export
from moeify.errors import NotExportable
from moeify.ir.modes import is_training, set_training
from moeify.ir.program import flat
from tests import programs
from tests.test_route import routed


def same(made, exported: torch.export.ExportedProgram, *inputs: Tensor) -> None:
    for x in inputs:
        torch.testing.assert_close(exported.module(check_guards=False)(x), made.run(x))


def test_other_sizes():
    made = programs.plain()
    routed(made)
    same(made, export(made), torch.randint(40, (3, 9)), torch.randint(40, (7, 2)))


def test_the_program_stays_in_training_mode():
    made = programs.with_dropout()
    routed(made)
    set_training(made.graph_module, True)
    before = made.graph_module.code
    exported = export(made)
    assert is_training(made.graph_module)
    assert made.graph_module.code == before
    assert not is_training(exported.module(check_guards=False))


@pytest.mark.parametrize("router", ["switch{jitter=0.1}", "noisy-topk{init-std=0.1}"])
def test_noise_is_dropped(router):
    made = programs.plain(router=router, top_k=1)
    routed(made)
    set_training(made.graph_module, False)
    ids = torch.randint(40, (4, 9))
    expected = made.run(ids)
    assert "jitter_like" in made.graph_module.code or "normal_like" in made.graph_module.code
    drop_router_noise(made)
    assert not {"jitter_like", "normal_like"} & {getattr(n.target, "_opname", "") for n in made.graph.nodes}
    assert "softplus" not in made.graph_module.code  # the deviation of noise that is not there
    torch.testing.assert_close(made.run(ids), expected, rtol=0, atol=0)


class Broadcast(nn.Module):
    """Its noise decides the shape of the sum, so that zeros must stay."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + torch.ops.moeify.normal_like(x, False) * 2


def test_noise_that_gives_the_shape_leaves_zeros():
    made = programs.capture(Broadcast(), torch.randn(3, 4), dynamic=(0,))
    x = torch.randn(5, 4)
    expected = made.run(x)
    drop_router_noise(made)
    assert "normal_like" not in made.graph_module.code
    torch.testing.assert_close(made.run(x), expected, rtol=0, atol=0)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(6 if x.shape[0] > 1 else 1, 4)


@pytest.mark.parametrize(
    ("size", "hint"),
    [
        (1, "torch.export fixes sizes of 0 and 1: capture the model with an example of batch >= 2"),
        (6, "give x its fixed size, 6, in the place of batch"),
    ],
)
def test_a_size_that_is_not_dynamic_is_refused(size, hint):
    made = programs.capture(Fixed(), torch.randn(size, 4), dynamic=())
    made.inputs = (dataclasses.replace(made.inputs[0], shape=("batch", 4)),)
    with pytest.raises(NotExportable) as error:
        export(made)
    what = f"dimension 0 of the input x, batch, is fixed at {size} by torch.export"
    assert str(error.value) == f"{what}\n  hint: {hint}"


def test_pending_weights_are_computed():
    made = programs.plain()
    routed(made)
    assert made.pending
    exported = export(made)
    assert not any(value.is_meta for value in exported.state_dict.values())
    assert len(flat(made.run(*made.example))) == 1
