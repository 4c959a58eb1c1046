"""What make-experts leaves: the graph, the numbers, the parameters."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from moeify.errors import NotDivisible, Refused
from moeify.ir.metadata import outputs
from moeify.ir.printer import program_text
from moeify.passes.make_experts import MakeExperts
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import programs

MAKERS = {
    "plain": programs.plain,
    "gated": programs.gated,
    "dropout": programs.with_dropout,
    "shared-weights": programs.shared_weights,
    "custom": programs.custom,
    "custom-norm": lambda **recipe: programs.custom(pointwise=False, **recipe),
    "images": programs.images,
}
RECIPES = {
    "copy": {},
    "one-expert": {"experts": 1, "top_k": 1},
    "shared": {"shared": 2},
    "shared-gate": {"shared": 1, "shared_gate": True},
    "granular": {"method": "granular"},
    "granular-shared": {"method": "granular{shards=2}", "top_k": 4, "shared": 1},
}


def make(made):
    log = Log()
    MakeExperts().apply(made, log)
    for rule in ALWAYS:
        rule(made)
    return log.lines


@pytest.mark.parametrize("name", ["gated", "dropout", "images"])
def test_graph(golden, name):
    made = MAKERS[name](shared=1, shared_gate=True) if name == "gated" else MAKERS[name]()
    make(made)
    golden(f"make-experts-{name}", program_text(made, "make-experts"))


# A norm over the hidden width cannot be cut: test_methods holds the refusal.
POSSIBLE = [(m, r) for m in MAKERS for r in RECIPES if (m, r.partition("-")[0]) != ("custom-norm", "granular")]


@pytest.mark.parametrize(("maker", "recipe"), POSSIBLE)
def test_exact_methods_keep_the_outputs(maker, recipe):
    before, after = programs.outputs_before_and_after(MAKERS[maker](**RECIPES[recipe]), make)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("method", ["noise", "drop"])
def test_other_methods_change_them(method):
    before, after = programs.outputs_before_and_after(programs.plain(method=method), make)
    assert not torch.allclose(after, before)


def test_other_sizes_than_the_example():
    made = programs.plain(2)
    ids = torch.randint(40, (3, 7))
    before = made.run(ids)
    make(made)
    torch.testing.assert_close(made.run(ids), before)
    assert made.run(ids[:0]).shape == (0, 7, 3)


def test_a_block_called_twice_gets_one_set_of_experts():
    made = programs.shared_weights()
    assert make(made) == ["layers.1: 8 experts of width 24 by copy, 2 calls"]
    assert sum(name.endswith("experts.up") for name, _ in made.graph_module.named_parameters()) == 1
    assert set(outputs(made.graph)) == {("layers.1", 0), ("layers.1", 1)}


def test_only_selected_blocks_change():
    made = programs.plain(2)
    made.selected["layers.0"] = False
    assert make(made) == ["layers.1: 8 experts of width 24 by copy"]
    targets = [str(node.target) for node in made.graph.nodes]
    assert targets.count("moeify.ffn.default") == targets.count("moeify.dispatch_ffn.default") == 1


def test_overrides_reach_their_block():
    made = programs.plain(2, overrides=(("layers.1", {"experts": 4, "method": "granular", "shared": 1}),))
    assert make(made) == [
        "layers.0: 8 experts of width 24 by copy",
        "layers.1: 4 experts of width 12 and 1 shared by granular",
    ]


def test_values_are_computed_later():
    made = programs.plain(shared=1, shared_gate=True)
    make(made)
    assert made.parameter("layers.0.experts.up").is_meta
    assert made.parameter("layers.0.shared_gate.weight").is_meta
    made.materialise()
    assert not any(p.is_meta for p in made.graph_module.parameters())
    assert not made.parameter("layers.0.shared_gate.weight").any()


def test_types_of_a_finished_program_are_let_go():
    made = programs.program([programs.Ffn()])
    make(made)
    (output,) = outputs(made.graph).values()
    value = weakref.ref(output.meta["val"])
    del made, output
    gc.collect()
    assert value() is None


@pytest.mark.parametrize("frozen", [True, False])
def test_experts_of_a_frozen_block_are_frozen(frozen):
    made = programs.plain(2, shared=1, shared_gate=True)
    made.selected["layers.1"] = False
    for name in ("up", "down"):
        made.set_parameter(f"layers.0.{name}.weight", made.parameter(f"layers.0.{name}.weight"), not frozen)
    make(made)
    made.materialise()
    new = [p for n, p in made.graph_module.named_parameters() if n.startswith(("layers.0.experts", "layers.0.shared"))]
    assert len(new) == 9
    assert all(p.requires_grad != frozen for p in new)


def test_new_nodes_keep_the_origin_of_the_block():
    made = programs.plain()
    make(made)
    (output,) = outputs(made.graph).values()
    assert "layers.0" in str(output.meta["nn_module_stack"])


def test_refusals_name_the_block():
    with pytest.raises(NotDivisible) as error:
        make(programs.plain(method="granular", experts=10, top_k=5))
    assert str(error.value) == (
        "a hidden width of 24 does not split into 5 equal shards\n  at: layers.0\n  hint: choose 2 for --top-k"
    )
    with pytest.raises(Refused):
        make(programs.custom(pointwise=False, method="granular"))
