"""clean-up: no moe.ffn, no dead node and no unread dense weight is left."""

from __future__ import annotations

import pytest
import torch

from moeify.ir.metadata import outputs
from moeify.ir.modes import set_training
from moeify.ir.printer import program_text
from moeify.passes.clean_up import CleanUp
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import programs
from tests.test_lower_experts import targets
from tests.test_make_experts import MAKERS
from tests.test_route import routed


def clean(made):
    log = Log()
    CleanUp().apply(made, log)
    for rule in ALWAYS:
        rule(made)
    assert "moeify.ffn.default" not in targets(made)
    return log.lines


def dense(made):
    made.selected = dict.fromkeys(made.selected, False)
    return made


@pytest.mark.parametrize("name", ["plain", "gated", "dropout"])
def test_graph_of_what_stays_dense(golden, name):
    made = dense(MAKERS[name]())
    clean(made)
    golden(f"clean-up-{name}", program_text(made, "clean-up"))


@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("maker", MAKERS)
def test_outputs_stay(maker, convert):
    made = MAKERS[maker](shared=1) if convert else dense(MAKERS[maker]())
    if convert:
        routed(made)
    tags = set(outputs(made.graph))
    before, after = programs.outputs_before_and_after(made, clean)
    torch.testing.assert_close(after, before)
    assert set(outputs(made.graph)) == tags


def test_dense_weights_go_when_the_last_recipe_has_read_them():
    made = programs.plain(2, blocks="layers.0")
    made.selected["layers.1"] = False
    routed(made)
    assert clean(made) == ["1 moe.ffn expanded, 4 dead nodes and 0 unread parameters dropped"]
    made.materialise()
    names = {name for name, _ in made.graph_module.named_parameters()}
    assert {n for n in names if n.startswith("layers.0")} == {
        "layers.0.norm.weight", "layers.0.norm.bias", "layers.0.router.weight", "layers.0.experts.up",
        "layers.0.experts.down", "layers.0.experts.up_bias", "layers.0.experts.down_bias",
    }  # fmt: skip
    assert {"layers.1.up.weight", "layers.1.up.bias", "layers.1.down.weight", "layers.1.down.bias"} < names


def test_values_that_exist_already_lose_their_sources_at_once():
    made = programs.plain()
    routed(made)
    made.materialise()
    assert clean(made) == ["0 moe.ffn expanded, 4 dead nodes and 4 unread parameters dropped"]


def test_the_second_name_of_a_shared_weight_goes_too():
    made = programs.shared_weights()
    routed(made)
    clean(made)
    made.materialise()
    left = [name for name, _ in made.graph_module.named_parameters(remove_duplicate=False)]
    assert not [name for name in left if ".up." in name or ".down." in name]


def test_a_weight_that_is_read_elsewhere_stays():
    made = programs.plain()
    up = next(n for n in made.graph.nodes if n.target == "layers.0.up.weight")
    output = made.graph.output_node()
    output.args = ((*output.args[0], up),)
    routed(made)
    clean(made)
    made.materialise()
    assert "layers.0.up.weight" in dict(made.graph_module.named_parameters())


def test_dropout_of_what_stays_dense_follows_the_train_switch():
    made = dense(programs.with_dropout())
    clean(made)
    first = made.graph_module(*made.example)
    assert torch.equal(first, made.graph_module(*made.example))
    set_training(made.graph_module, True)
    assert not torch.equal(first, made.graph_module(*made.example))


def test_inputs_that_nobody_reads_stay():
    made = dense(programs.plain())
    output = made.graph.output_node()
    head = next(n for n in made.graph.nodes if n.target == "head.weight")
    output.args = ((head,),)
    clean(made)
    assert [n.op for n in made.graph.nodes] == ["get_attr", "placeholder", "output"]
