"""What route leaves: the graph, the numbers, the parameters, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from moeify.errors import BadRecipe, Refused
from moeify.ir.modes import set_training
from moeify.ir.printer import program_text
from moeify.ir.weights import generator_for
from moeify.nn.routers import ROUTERS
from moeify.passes.make_experts import MakeExperts
from moeify.passes.route import Route, _traced
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import programs
from tests.test_make_experts import MAKERS


def routed(made):
    MakeExperts().apply(made, Log())
    log = Log()
    Route().apply(made, log)
    for rule in ALWAYS:
        rule(made)
    return log.lines


@pytest.mark.parametrize("router", ["softmax-topk", "switch", "noisy-topk", "hash"])
def test_graph(golden, router):
    made = programs.gated(router=router, top_k=1)
    routed(made)
    golden(f"route-{router}", program_text(made, "route"))


@pytest.mark.parametrize("maker", MAKERS)
def test_exact_methods_keep_the_outputs(maker):
    method = "copy" if maker == "custom-norm" else "granular"
    before, after = programs.outputs_before_and_after(MAKERS[maker](method=method, shared=1), routed)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("method", ["copy", "granular"])
@pytest.mark.parametrize("router", ["noisy-topk", "hash", "hash{table=balanced}"])
def test_routers_whose_gates_sum_to_one_keep_the_outputs(router, method):
    made = programs.shared_weights(router=router, method=method)
    before, after = programs.outputs_before_and_after(made, routed)
    torch.testing.assert_close(after, before)


def test_the_graph_computes_what_the_router_module_computes():
    made = programs.plain(router="switch{jitter=0}", top_k=1)
    routed(made)
    dispatch = next(n for n in made.graph.nodes if "dispatch_ffn" in str(n.target))
    x_TD, experts, weights = dispatch.args[:3]
    made.graph.output_node().args = ((x_TD, experts, weights),)
    made.graph.set_codegen(fx.graph.CodeGen())  # the exported one knows the old output
    made.graph_module.recompile()
    x, chosen, gates = made.run(torch.randint(40, (4, 9)))
    router = ROUTERS.parse("switch{jitter=0}").build(programs.D, 8, 1, dtype=torch.float32)
    router.reset(generator_for(0, "layers.0.router"))
    expected = router.eval()(x)
    assert torch.equal(chosen, expected[0])
    torch.testing.assert_close(gates, expected[1])


def test_parameters_have_the_names_of_the_router():
    made = programs.plain(router="noisy-topk")
    assert routed(made) == ["layers.0: noisy-topk over 8 experts, 2 per token"]
    names = {name for name, _ in made.graph_module.named_parameters() if "router" in name}
    assert names == {"layers.0.router.weight", "layers.0.router.noise_weight"}


def test_the_hash_table_is_a_buffer():
    made = programs.plain(router="hash")
    routed(made)
    assert dict(made.graph_module.named_buffers())["layers.0.router.table"].shape == (40, 2)


def test_rows_of_one_copy_start_equal():
    made = programs.plain(method="granular", top_k=4)
    routed(made)
    weight = made.parameter("layers.0.router.weight")
    assert torch.equal(weight[0::4].repeat_interleave(4, 0), weight)
    assert not torch.equal(weight[0], weight[4])


def test_layers_start_from_different_routers_and_calls_share_one():
    made = programs.plain(2)
    routed(made)
    assert not torch.equal(made.parameter("layers.0.router.weight"), made.parameter("layers.1.router.weight"))
    assert routed(programs.shared_weights()) == ["layers.1: softmax-topk over 8 experts, 2 per token"]


def test_one_trace_serves_all_blocks():
    _traced.cache_clear()
    routed(programs.plain(4, overrides=(("layers.3", {"experts": 4}),)))
    assert _traced.cache_info().misses == 2
    assert _traced.cache_info().hits == 2


def test_gradients_reach_router_and_experts_and_the_noise_is_on_in_training():
    made = programs.plain(router="noisy-topk{init-std=0.1}")
    routed(made)
    made.materialise()
    set_training(made.graph_module, True)
    first, second = (made.graph_module(*made.example) for _ in range(2))
    first.square().sum().backward()
    for name in ("router.weight", "router.noise_weight", "experts.up", "experts.down"):
        grad = made.parameter(f"layers.0.{name}").grad
        assert grad is not None
    assert made.parameter("layers.0.experts.up").grad.abs().sum() > 0
    noise = [n for n in made.graph.nodes if "normal_like" in str(n.target)]
    assert [n.args[1] for n in noise] == [True]
    assert first.shape == second.shape


def test_the_router_of_a_frozen_block_is_frozen():
    made = programs.plain(2)
    made.set_parameter("layers.0.up.weight", made.parameter("layers.0.up.weight"), requires_grad=False)
    routed(made)
    assert not made.parameter("layers.0.router.weight").requires_grad
    assert made.parameter("layers.1.router.weight").requires_grad


@pytest.mark.parametrize("router", ["softmax-topk", "noisy-topk", "switch", "hash", "top-p", "base", "expert-choice"])
@pytest.mark.parametrize("maker", ["plain", "shared-weights", "custom-norm"])
def test_no_tokens(maker, router):
    made = MAKERS[maker](router=router, top_k=1, shared=1)
    routed(made)
    made.materialise()
    set_training(made.graph_module, True)
    out = made.graph_module(torch.zeros(2, 0, dtype=torch.int64))
    assert out.shape == (2, 0, 3)
    out.sum().backward()
    grad = made.parameter(f"{made.blocks[0].anchor}.experts.up").grad
    assert not grad.any()


def test_refuses_hash_where_no_token_ids_fit():
    with pytest.raises(Refused) as error:
        routed(programs.images(router="hash"))
    rows = str(error.value).split("rows, ")[1].split("\n")[0]
    assert str(error.value) == (
        "the hash router needs token ids, and no embedding of the model reads a tensor of the shape of this block's "
        f"rows, {rows}\n  at: block\n  hint: choose another router for this block"
    )


def test_refuses_switch_with_two_experts_per_token():
    with pytest.raises(BadRecipe) as error:
        routed(programs.plain(router="switch"))
    assert str(error.value) == (
        "the switch router chooses one expert per token, not 2\n  at: layers.0\n  hint: --top-k 1"
    )


def causal(router: str, **recipe):
    """The program with a triangle that somebody reads."""
    made = programs.plain(router=router, **recipe)
    read = next(node for node in made.graph.nodes if node.target == torch.ops.aten.embedding.default)
    with made.graph.inserting_before(read.next):
        made.graph.call_function(torch.ops.aten.tril.default, (read,))
    return made


@pytest.mark.parametrize(
    ("router", "when", "hint"),
    [
        ("expert-choice", "", "every call has whole texts"),
        ("sinkhorn", " in training", "that is meant: evaluation does not mix"),
    ],
)
def test_refuses_a_router_that_mixes_tokens_in_a_causal_model(router, when, hint):
    with pytest.raises(Refused) as error:
        Route().apply(causal(router), Log())
    assert str(error.value) == (
        f"the {router} router mixes tokens{when}: a token's experts depend on tokens after it, which this model keeps "
        f"from it (%tril_default)\n  at: layers.0\n"
        f"  hint: choose another router, or {router}{{allow-causal=true}} if {hint}"
    )


def test_a_router_that_mixes_tokens_where_the_model_is_not_causal_or_it_is_wanted():
    assert routed(programs.plain(router="expert-choice")) == ["layers.0: expert-choice over 8 experts, 2 per token"]
    made = causal("sinkhorn{allow-causal=true}")
    MakeExperts().apply(made, Log())
    Route().apply(made, Log())
