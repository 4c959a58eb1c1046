"""The topk router: its scores, where they start, its weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import BadOption, Refused
from moeify.experts.planning import plan_block
from moeify.ir.hidden import hidden
from moeify.ir.inline import trace
from moeify.ir.printer import program_text
from moeify.ir.weights import generator_for
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.router import Router
from moeify.passes.make_experts import MakeExperts
from moeify.passes.place_experts import KEY, PlaceExperts
from moeify.passes.route import Route
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests import profiles, programs

D, E = 8, 6
KINDS = ["topk{init=normal}", "topk{score=mlp,hidden=5}", "topk{score=neuron,representatives=2}"]


def build(text: str, top_k: int = 2, dtype: torch.dtype = torch.float32) -> Router:
    spec = ROUTERS.parse(text).for_block(programs.plain().blocks[0])
    router = spec.build(D, E, top_k, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    router.reset(generator)
    if "neuron" in text:  # its rows come from a block
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.normal_(generator=generator)
    return router.eval()


def tokens(count: int) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(count))


def scores(router: Router, x: Tensor) -> Tensor:
    """By the definition, from the parameters."""
    p = dict(router.named_parameters())
    if "up.0" in p:
        return sum(F.gelu(x @ p[f"up.{j}"].t() + p[f"up_bias.{j}"]).abs() for j in range(2))
    if "up" in p:
        x = torch.clamp(x @ p["up"].t() + p["up_bias"], min=0)
    return x @ p["weight"].t() + p["bias"]


@pytest.mark.parametrize("text", KINDS)
def test_the_highest_scores_are_chosen_with_weight_one(text):
    router, x = build(text), tokens(40)
    experts, weights = router(x)
    assert experts.tolist() == torch.sort(scores(router, x), descending=True, stable=True).indices[:, :2].tolist()
    assert len(experts.unique()) > 2  # or there was nothing to choose
    assert torch.equal(weights, torch.ones(40, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("text", KINDS)
def test_weights_have_the_dtype_of_the_tokens(text, dtype):
    experts, weights = build(text, dtype=dtype)(tokens(9).to(dtype))
    assert (experts.dtype, weights.dtype) == (torch.int64, dtype)
    assert (weights == 1).all()


@pytest.mark.parametrize("text", KINDS)
def test_export_keeps_the_number_of_tokens_free(text):
    router = build(text)
    graph_module = trace(router, (tokens(4),), dynamic=(0,))
    for count in (0, 1, 17):
        for got, expected in zip(graph_module(tokens(count)), router(tokens(count)), strict=True):
            assert torch.equal(got, expected)


def test_scores_that_are_all_alike_choose_the_first():
    assert build("topk{init=zeros}", 3)(tokens(4))[0].tolist() == [[0, 1, 2]] * 4


def routed(maker: str = "plain", *, method: str = "carve", shared: int = 0, **recipe):
    made = profiles.profiled(getattr(programs, maker)(method=method, experts=4, shared=shared, **recipe))
    MakeExperts().apply(made, Log())
    log = Log()
    Route().apply(made, log)
    for rule in ALWAYS:
        rule(made)
    return made, log.lines


@pytest.mark.parametrize("init", ["auto", "centroid", "regress", "classify"])
@pytest.mark.parametrize("maker", ["plain", "gated", "custom"])
def test_centroid_is_the_mean_direction_of_the_expert_s_rows(maker, init):
    made, _ = routed(maker, router=f"topk{{init={init}}}")
    block = made.blocks[0]
    ref = block.gate or block.up
    rows = F.normalize(ref.read(made.parameter(ref.parameter)), dim=1)
    units = plan_block(made, block).partition.experts_EW
    made.materialise()
    weight = made.parameter("layers.0.router.weight")
    for e, members in enumerate(units):
        mean = sum(rows[unit] for unit in members) / len(members)
        torch.testing.assert_close(weight[e], mean / mean.norm())
    assert not made.parameter("layers.0.router.bias").any()


@pytest.mark.parametrize("maker", ["plain", "gated"])
def test_analytic_scores_are_hidden_units_of_the_dense_block(maker):
    """The graph against the dense block's own hidden value: the first two units of each expert."""
    made, lines = routed(maker, router="topk{score=neuron,representatives=2}")
    assert lines == ["layers.0: topk{score=neuron,representatives=2} over 4 experts, 2 per token"]
    block = made.blocks[0]
    x = torch.randn(20, programs.D, generator=torch.Generator().manual_seed(1))
    size = hidden(block, made.parameter, x).abs()
    units = plan_block(made, block).partition.experts_EW
    expected = torch.stack([size[:, members[:2]].sum(1) for members in units], dim=1)
    made.materialise()
    router = ROUTERS.parse("topk{score=neuron,representatives=2}").for_block(block).build(
        programs.D, 4, 2, dtype=torch.float32
    )  # fmt: skip
    router.load_state_dict({name: made.parameter(f"layers.0.router.{name}") for name in router.state_dict()})
    torch.testing.assert_close(router.scores(x), expected)
    dispatch = next(n for n in made.graph.nodes if "dispatch_ffn" in str(n.target))
    made.graph.output_node().args = ((dispatch.args[0], dispatch.args[1], dispatch.args[2]),)
    made.graph.set_codegen(torch.fx.graph.CodeGen())  # the exported one knows the old output
    made.graph_module.recompile()
    x_TD, chosen, gates = made.run(torch.randint(40, (4, 9)))
    assert torch.equal(chosen, router(x_TD)[0])
    assert (gates == 1).all()


def test_the_representative_comes_first():
    made, _ = routed(router="topk{score=neuron}")
    plan = plan_block(made, made.blocks[0])
    up = made.parameter("layers.0.up.weight").clone()
    made.materialise()
    assert torch.equal(made.parameter("layers.0.router.up.0"), up[plan.partition.representative_E])


def test_a_drawn_start_is_that_of_the_seed():
    made, _ = routed(router="topk{score=mlp}")
    router = ROUTERS.parse("topk{score=mlp}").build(programs.D, 4, 2, dtype=torch.float32)
    router.reset(generator_for(0, "layers.0.router"))
    for name, value in router.state_dict().items():
        assert torch.equal(made.parameter(f"layers.0.router.{name}"), value)
    assert router.weight.std() > 0


@pytest.mark.parametrize("router", ["topk{score=linear}", "topk{score=neuron}"])
def test_graph(golden, router):
    made, _ = routed("gated", shared=2, router=router)
    golden(f"route-topk-{ROUTERS.parse(router).score}", program_text(made, "route"))


ORDER = [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("router", "how"),
    [
        ("topk", "folded into the router"),
        ("topk{init=normal}", "folded into the router"),
        ("topk{score=neuron}", "aten.gelu.default stands between its scores and its choice"),
        ("topk{score=mlp,hidden=4}", "aten.relu.default stands between its scores and its choice"),
        ("topk{score=mlp,hidden=8}", "layers.0.router.up has 8 rows for 4 experts"),
        ("softmax-topk{renormalise=false,scale=4}", "folded into the router"),
    ],
)
@pytest.mark.parametrize("computed", [False, True])
def test_experts_are_placed_and_the_function_stays(router, how, computed):
    made, _ = routed(router=router)
    ids = torch.randint(40, (5, 9), generator=torch.Generator().manual_seed(0))
    twin = made.clone()
    before = twin.run(ids)
    made = twin if computed else made
    made.provenance[KEY] = {"layers.0": ORDER}
    log = Log()
    PlaceExperts().apply(made, log)
    assert log.lines[0].endswith(how)
    torch.testing.assert_close(made.run(ids), before)


def test_softmax_topk_scales_its_weights():
    plain = ROUTERS.parse("softmax-topk{renormalise=false}").build(D, E, 2, dtype=torch.float32)
    scaled = ROUTERS.parse("softmax-topk{renormalise=false,scale=6}").build(D, E, 2, dtype=torch.float32)
    for router in (plain, scaled):
        router.reset(torch.Generator().manual_seed(0))
    for got, expected in zip(scaled(tokens(9)), plain(tokens(9)), strict=True):
        assert torch.equal(got, expected if expected.dtype == torch.int64 else expected * 6)


def test_softmax_topk_with_zero_logits_and_scale_gives_weight_one():
    router = ROUTERS.parse("softmax-topk{renormalise=false,init-std=0,scale=6}").build(D, E, 2, dtype=torch.float32)
    router.reset(torch.Generator().manual_seed(0))
    torch.testing.assert_close(router(tokens(9))[1], torch.ones(9, 2))


@pytest.mark.parametrize(
    ("text", "sum_to_one", "one"),
    [
        ("topk", False, True),
        ("softmax-topk", True, False),
        ("softmax-topk{scale=2}", False, False),
        ("softmax-topk{scale=1}", True, False),
    ],
)
def test_what_the_weights_are(text, sum_to_one, one):
    spec = ROUTERS.parse(text)
    assert (spec.gates_sum_to_one, spec.gates_are_one(2)) == (sum_to_one, one)
    assert ROUTERS.parse("softmax-topk").gates_are_one(1)


@pytest.mark.parametrize(
    ("text", "start", "fit"),
    [
        ("topk", "centroid", None),
        ("topk{init=regress}", "centroid", "regress"),
        ("topk{score=mlp,init=classify}", "normal", "classify"),
        ("topk{score=neuron}", "analytic", None),
        ("topk{score=neuron,init=regress}", "analytic", "regress"),
        ("topk{init=zeros}", "zeros", None),
    ],
)
def test_starts(text, start, fit):
    spec = ROUTERS.parse(text)
    assert (spec.start, spec.fit) == (start, fit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk{score=cosine}", "topk.score is 'cosine'\n  hint: choose one of linear, mlp, neuron"),
        (
            "topk{score=mlp,init=centroid}",
            (
                "topk.init is 'centroid', which a score of kind mlp cannot start from\n"
                "  hint: choose one of normal, zeros, regress, classify"
            ),
        ),
        ("topk{hidden=0}", "topk.hidden is 0: it must be at least 1"),
        ("topk{representatives=0}", "topk.representatives is 0: it must be at least 1"),
        ("topk{init-std=-1}", "topk.init-std is -1.0: it must be a finite number of at least 0"),
        (
            "softmax-topk{scale=-1}",
            (
                "softmax-topk.scale is -1.0: it must be a finite number of at least 0\n"
                "  hint: 0 leaves the weights as they are"
            ),
        ),
    ],
)
def test_options_that_make_no_sense(text, message):
    with pytest.raises(BadOption) as error:
        ROUTERS.parse(text)
    assert str(error.value) == message


def test_refuses_experts_that_are_no_parts_of_the_block():
    with pytest.raises(Refused) as error:
        routed(method="copy", router="topk")
    assert str(error.value) == (
        "the centroid start of topk needs experts that are parts of the dense block\n  at: layers.0\n"
        "  hint: use a method that splits it, or another router: its experts are whole, and topk's weights are 1"
    )


def test_refuses_hidden_units_of_an_activation_without_a_name():
    with pytest.raises(Refused) as error:
        routed("custom", router="topk{score=neuron}")
    assert str(error.value) == (
        "the neuron score computes hidden units in the router, and the block's activation has no name\n"
        "  at: layers.0\n  hint: use --router topk{score=linear}"
    )


def test_refuses_more_representatives_than_units():
    with pytest.raises(BadOption) as error:
        routed(router="topk{score=neuron,representatives=7}")
    assert str(error.value) == "topk.representatives is 7, and an expert has 6 hidden units\n  at: layers.0"


def test_refuses_a_neuron_score_without_a_block():
    with pytest.raises(Refused) as error:
        ROUTERS.parse("topk{score=neuron}").build(D, E, 2, dtype=torch.float32)
    assert str(error.value) == "the neuron score computes hidden units of a block, and no block is given"
