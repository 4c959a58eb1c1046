"""Methods that split a block: recipes, blocks, profiles and options that they refuse."""

from __future__ import annotations

import pytest
import torch

from moeify.errors import BadOption, BadRecipe, NotDivisible, Refused
from moeify.experts import METHODS
from moeify.experts.planning import require_profile
from moeify.ir.block import Block
from moeify.ir.recipe import BlockRecipe
from tests import profiles, programs
from tests.split_blocks import SPLITS, block, dense, planned


def refusal(kind: type[Exception], text: str, b: Block | None = None, **recipe) -> str:
    with pytest.raises(kind) as error:
        METHODS.parse(text).plan(b or block(), BlockRecipe(text, **recipe), 0, torch.float32)
    return str(error.value)


def test_refuses_widths_that_do_not_divide():
    assert refusal(NotDivisible, "carve", experts=5) == (
        "a hidden width of 24 does not split into 5 equal experts\n  at: encoder.layer.3\n"
        "  hint: choose one of 2, 3, 4, 6, 8, 12, 24 for --experts"
    )
    assert refusal(NotDivisible, "split-random", experts=5, shared=2) == (
        "a hidden width of 24 does not split into 7 equal experts, 5 routed and 2 shared\n  at: encoder.layer.3\n"
        "  hint: choose one of 2, 3, 4, 6, 8, 12, 24 for --experts and --shared together"
    )


def test_refuses_a_gate_on_the_shared_experts():
    assert refusal(BadRecipe, "carve", experts=6, shared=2, shared_gate=True) == (
        "shared-gate would switch off a part of the dense function, which carve keeps whole\n  at: encoder.layer.3\n"
        "  hint: leave out --shared-gate"
    )


@pytest.mark.parametrize("router", ["softmax-topk", "noisy-topk", "hash"])
def test_refuses_weights_that_sum_to_one(router):
    assert refusal(BadRecipe, "split-random", experts=4, top_k=2, router=router) == (
        f"experts of split-random add up with weight 1 each, and the weights of {router} sum to 1\n"
        "  at: encoder.layer.3\n"
        "  hint: use --router topk, or softmax-topk{renormalise=false,scale=E} with E the number of experts"
    )


def test_one_expert_a_token_may_have_weights_that_sum_to_one():
    assert planned("split-random", block(), dense(), BlockRecipe("split-random", 4, 1, "hash")).num_experts == 4


@pytest.mark.parametrize("method", SPLITS)
def test_refuses_a_norm_over_the_hidden_width(method):
    made = programs.custom(pointwise=False)
    assert refusal(Refused, method, made.blocks[0]) == (
        "the hidden value is normalised over its whole width: it cannot be cut into experts\n"
        "  at: layers.0\n  hint: use --method copy"
    )


@pytest.mark.parametrize("method", ["carve", "split-coactivation", "split-random{compensate=true}"])
def test_refuses_to_start_without_data(method):
    made = programs.gated(method=method, experts=4)
    with pytest.raises(Refused) as error:
        require_profile(made)
    assert str(error.value) == (
        f"{method} needs statistics of the hidden units, and no data were given\n  at: layers.0\n"
        "  hint: give data of the model's task with --data"
    )


def test_refuses_importance_without_gradients():
    made = profiles.profiled(programs.gated(method="split-importance", experts=4), gradients=False)
    with pytest.raises(Refused) as error:
        require_profile(made)
    assert str(error.value) == (
        "split-importance needs the gradient of the loss, and the profile was made without\n  at: layers.0\n"
        "  hint: profile with --gradients"
    )


def test_refuses_the_profile_of_another_model():
    made, other = programs.gated(method="carve", experts=4), block()
    made.profile = profiles.profiled(programs.gated()).profile
    made.profile.blocks["layers.0"] = profiles.statistics(other, dense().__getitem__)
    with pytest.raises(Refused) as error:
        require_profile(made)
    assert str(error.value) == (
        "the profile is of a block of width 6 with 24 hidden units, and this one has 8 and 24\n  at: layers.0\n"
        "  hint: profile this model"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("carve{iterations=0}", "carve.iterations is 0: it must be at least 1"),
        ("split-kmeans{iterations=0}", "split-kmeans.iterations is 0: it must be at least 1"),
        ("split-coactivation{passes=-1}", "split-coactivation.passes is -1: it must be at least 0"),
    ],
)
def test_options_out_of_range(text, message):
    with pytest.raises(BadOption) as error:
        METHODS.parse(text)
    assert str(error.value) == message
