"""Every expert on: the twin program, and the error it measures."""

from __future__ import annotations

import pytest
import torch

from moeify.ir.printer import program_text
from moeify.pipeline.default import REWRITE
from moeify.pipeline.runner import run
from moeify.verify.all_on import all_on, all_on_errors
from moeify.verify.measure import Recording
from tests import profiles
from tests.test_make_experts import MAKERS

SPLITS = ["split-random", "split-kmeans", "split-coactivation", "split-importance", "split-energy", "carve"]


def rewritten(maker: str, **recipe):
    made = MAKERS[maker](**{"experts": 3, "top_k": 1, "shared": 1, **recipe})
    profiles.profiled(made)
    dense = Recording(made, made.example)
    run(made, REWRITE)
    made.materialise()
    return made, dense


@pytest.mark.parametrize("method", SPLITS)
@pytest.mark.parametrize("maker", [maker for maker in MAKERS if maker != "custom-norm"])
def test_all_on_is_the_dense_block_and_some_on_is_not(maker, method):
    made, dense = rewritten(maker, method=method)
    before = program_text(made)
    errors = all_on_errors(made, dense)
    assert set(errors) == {block.anchor for block in made.converted()}
    assert max(errors.values()) <= 1e-5
    assert min(dense.block_errors(made).values()) > 1e-3
    assert program_text(made) == before


def test_the_twin_shares_the_weights_and_takes_any_number_of_tokens():
    made, _ = rewritten("dropout", method="split-random", shared=0)
    twin = all_on(made)
    assert twin.parameter("layers.0.experts.up") is made.parameter("layers.0.experts.up")
    assert twin.run(torch.randint(40, (3, 7))).shape == (3, 7, 3)
    assert twin.run(torch.randint(40, (0, 7))).shape == (0, 7, 3)


def test_blocks_that_are_not_split_are_left_out():
    made, dense = rewritten("plain", method="copy")
    assert all_on_errors(made, dense) == {}


def test_a_lost_unit_is_seen():
    made, dense = rewritten("gated", method="carve")
    made.parameter("layers.0.experts.down").data[1, :, 0] = 0
    assert all_on_errors(made, dense)["layers.0"] > 1e-3
