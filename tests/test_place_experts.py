"""place-experts: the graph, the same function, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeify.backends.exporting import export
from moeify.errors import Refused
from moeify.ir.printer import program_text
from moeify.ir.sharding import KEY as SHARDED
from moeify.passes.place_experts import KEY, PlaceExperts
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import programs
from tests.test_make_experts import MAKERS
from tests.test_route import routed

ROUTERS = ("softmax-topk", "softmax-topk{renormalise=false}", "noisy-topk{init-std=0.5}", "switch", "hash")
ORDER = [5, 2, 7, 0, 1, 6, 4, 3]
COPIES = [5, 2, 7, 0, 1, 6, 4, 3, 5, 5, 0]  # expert 5 three times, expert 0 twice


def mixture(maker: str = "plain", **recipe):
    recipe = {"experts": 8, "method": "noise{std=0.3}", "top_k": 1 if recipe.get("router") == "switch" else 2, **recipe}
    made = MAKERS[maker](**recipe)
    routed(made)
    return made


def put(made, order):
    blocks = {
        str(n.target).rpartition(".experts.")[0] for n in made.graph.nodes if str(n.target).endswith("experts.up")
    }
    made.provenance[KEY] = dict.fromkeys(blocks, order)
    log = Log()
    PlaceExperts().apply(made, log)
    for rule in ALWAYS:
        rule(made)
    return log.lines


def test_graph(golden):
    made = mixture("gated")
    before = program_text(made)
    assert put(made, ORDER) == ["layers.0: 8 of 8 experts move, folded into the router"]
    assert program_text(made) == before


def test_graph_with_copies(golden):
    made = mixture("gated")
    assert put(made, COPIES) == ["layers.0: 8 of 8 experts move, 3 copies, looked up for each token"]
    golden("place-experts-copies", program_text(made, "place-experts"))


@pytest.mark.parametrize("order", [ORDER, COPIES], ids=["folded", "copies"])
@pytest.mark.parametrize(
    ("maker", "router"),
    [*(("plain", router) for router in ROUTERS), *((maker, "softmax-topk") for maker in MAKERS if maker != "plain")],
)
def test_outputs_stay(maker, router, order):
    made = mixture(maker, router=router)
    before, after = programs.outputs_before_and_after(made, lambda program: put(program, order))
    torch.testing.assert_close(after, before)
    assert before.abs().max() > 0


def test_the_experts_and_the_router_do_move():
    made = mixture()
    made.materialise()
    up, rows = (made.parameter(f"layers.0.{name}").clone() for name in ("experts.up", "router.weight"))
    put(made, ORDER)
    assert torch.equal(made.parameter("layers.0.experts.up"), up[ORDER])
    assert torch.equal(made.parameter("layers.0.router.weight"), rows[ORDER])


def test_recipes_stay_recipes_and_trained_stays_trained():
    made, plain = mixture(), mixture()
    put(made, ORDER)
    assert "layers.0.experts.up" in made.pending
    made.materialise()
    plain.materialise()
    assert torch.equal(made.parameter("layers.0.experts.up"), plain.parameter("layers.0.experts.up")[ORDER])
    assert made.parameter("layers.0.experts.up").requires_grad
    put(made, COPIES)
    assert not made.parameter("layers.0.experts.up").requires_grad
    assert made.parameter("layers.0.experts.up").shape[0] == len(COPIES)


@pytest.mark.parametrize("router", ["noisy-topk", "softmax-topk{init-std=0}"])
def test_experts_of_equal_scores_keep_their_order(router):
    """All rows are zero: the first experts are chosen, and they are different from each other."""
    made = mixture(router=router)
    before, after = programs.outputs_before_and_after(made, lambda program: put(program, ORDER))
    assert torch.equal(after, before)


def test_shards_of_a_granular_copy_stay_together():
    made = mixture(method="granular", top_k=4)
    before, after = programs.outputs_before_and_after(made, lambda program: put(program, [*range(15, -1, -1)][-8:]))
    torch.testing.assert_close(after, before)


def test_copies_share_the_tokens_of_their_expert():
    made = mixture(router="softmax-topk{init-std=0}", top_k=2)  # every token to experts 0 and 1
    put(made, COPIES)
    dispatch = next(n for n in made.graph.nodes if "dispatch_ffn" in str(n.target))
    seen = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n is dispatch.args[1]:
                seen.append(value)
            return value

    made.materialise()
    with torch.no_grad():
        Watch(made.graph_module).run(*made.example)
    assert torch.bincount(seen[0].flatten(), minlength=11).tolist() == [0, 0, 0, 5, 10, 0, 0, 0, 0, 0, 5]


def test_exports_again_with_any_number_of_tokens():
    made = mixture()
    put(made, COPIES)
    again = export(made).module(check_guards=False)
    ids = torch.randint(40, (3, 7))
    torch.testing.assert_close(again(ids), made.run(ids))


def test_a_router_that_knows_its_experts_is_left_alone():
    made = mixture()
    sort = next(n for n in made.graph.nodes if n.target == torch.ops.aten.sort.stable)
    scores = sort.args[0]
    with made.graph.inserting_before(sort):
        first = made.graph.call_function(torch.ops.aten.narrow.default, (scores, 1, 0, 4))
    first.meta["val"] = scores.meta["val"][:, :4]
    sort.update_arg(0, first)
    made.graph_module.recompile()
    made.materialise()
    before = made.run(*made.example)
    assert put(made, ORDER)[0].endswith(
        "looked up for each token: aten.narrow.default stands between its scores and its choice"
    )
    torch.testing.assert_close(made.run(*made.example), before)


def test_why_a_router_is_left_alone_is_said():
    made = mixture()
    linear = next(
        n for n in made.graph.nodes if n.target == torch.ops.aten.linear.default and "router" in str(n.args[1])
    )
    made.graph_module.register_parameter("bias", nn.Parameter(torch.arange(8.0)))
    with made.graph.inserting_after(linear):
        read = made.graph.get_attr("bias")
    with made.graph.inserting_after(read):
        add = made.graph.call_function(torch.ops.aten.add.Tensor, (linear, read))
    read.meta["val"] = linear.meta["val"][0]
    add.meta = dict(linear.meta)
    linear.replace_all_uses_with(add, delete_user_cb=lambda user: user is not add)
    made.graph_module.recompile()
    made.materialise()
    before = made.run(*made.example)
    assert put(made, ORDER) == [
        "layers.0: 8 of 8 experts move, looked up for each token: bias takes part in its choice"
    ]
    torch.testing.assert_close(made.run(*made.example), before)


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({}, "there is no placement to put experts by"),
        ({KEY: {"layers.0": [0, 1, 2, 3, 4, 5, 6, 6]}}, "the placement does not have each of the 8 experts"),
        ({KEY: {"layers.0": ORDER}, SHARDED: object()}, "the program is sharded already"),
    ],
)
def test_refuses(provenance, message):
    made = mixture()
    made.provenance.update(provenance)
    with pytest.raises(Refused) as caught:
        PlaceExperts().apply(made, Log())
    assert caught.value.what == message


def test_a_block_that_the_placement_does_not_name_stays():
    made = mixture()
    made.provenance[KEY] = {"elsewhere": ORDER}
    log = Log()
    PlaceExperts().apply(made, log)
    assert log.lines == []
