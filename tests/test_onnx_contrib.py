"""The contrib lowering: every router, expert count, activation and precision the kernel takes; what it refuses."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest
import torch

from moeify.backends.onnxruntime import contrib
from moeify.ir.activations import TABLE, lookup
from tests import programs
from tests.onnx_mixtures import Case, arrays, end_to_end, find, proto, relative, scatter, session
from tests.test_route import routed

ROUTERS = [
    "softmax-topk",
    "softmax-topk{renormalise=false}",
    "switch",
    "switch{capacity-factor=0.5}",
    "hash",
    "noisy-topk",
    "top-p{weight=probability}",
    "gshard{capacity-factor=0.5}",
]
EXACT = [Case("relu"), Case("gelu_tanh"), Case("silu"), Case("identity"), Case("silu", gated=True)]
# Sums of a few dozen products, in another order and in float32.
CLOSE = 1e-6
# The kernel rounds inputs, hidden values and results to float16; weights of the mixture too.
HALF = {torch.float32: CLOSE, torch.float16: 3e-3}


@pytest.mark.parametrize("router", ROUTERS)
def test_routers(router):
    made = programs.gated(router=router, top_k={"switch": 1, "gshard": 2}.get(router.partition("{")[0], 3))
    routed(made)
    scatter(made)
    runtime = session(end_to_end(made, contrib.lower))
    for shape in ((2, 5), (4, 9)):
        ids = torch.randint(40, shape)
        assert relative(torch.from_numpy(runtime.run(None, {"x": ids.numpy()})[0]), made.run(ids)) < CLOSE


def activation_of(made, name: str) -> None:
    for block in made.blocks:
        block.activation = name
    for node in made.graph.nodes:
        if node.target == torch.ops.moeify.ffn.default:
            node.args = tuple("gelu_tanh" if arg == "gelu" else arg for arg in node.args)


def test_a_capacity_drops_tokens():
    """Or the test of routers above did not test zero weights."""
    made = programs.gated(router="switch{capacity-factor=0.5}", top_k=1)
    routed(made)
    scatter(made)
    dispatch = next(n for n in made.graph.nodes if "dispatch_ffn" in str(n.target))
    made.graph.output_node().args = ((dispatch.args[2],),)
    made.graph.set_codegen(torch.fx.graph.CodeGen())
    made.graph_module.recompile()
    weights = made.run(torch.randint(40, (4, 9)))[0]
    assert 0 < int((weights == 0).sum()) < weights.numel()


@pytest.mark.parametrize("case", EXACT, ids=lambda case: f"{case.activation}-{case.gated}")
@pytest.mark.parametrize("bias", [True, False, "up_bias", "gate_bias", "down_bias"])
def test_activations_and_biases(case, bias):
    case = dataclasses.replace(case, bias=bias)
    inputs = case.inputs()
    assert relative(case.outputs(case.lowered(contrib.lower), inputs), case.expected(**inputs)) < CLOSE


@pytest.mark.parametrize(("E", "K"), [(1, 1), (2, 1), (2, 2), (3, 2), (8, 8), (17, 5), (64, 1), (64, 6), (64, 64)])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_counts(E, K, tokens, dtype):
    case = Case("silu", gated=True, E=E, K=K, dtype=dtype)
    inputs = case.inputs(tokens)
    result = case.outputs(case.lowered(contrib.lower), inputs)
    assert result.dtype == dtype
    assert result.shape == (tokens, case.D)
    if tokens:
        assert relative(result, case.expected(**inputs)) < HALF[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("K", [1, 3])
def test_weights_of_zero(dtype, K):
    case = Case("silu", gated=True, K=K, dtype=dtype)
    inputs = case.inputs()
    inputs["weights"][0] = 0  # all dropped
    inputs["weights"][1:3, 0] = 0
    result = case.outputs(case.lowered(contrib.lower), inputs)
    assert relative(result, case.expected(**inputs)) < HALF[dtype]
    assert not result[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_weights_stay_in_proportion(dtype):
    """Unnormalised probabilities of many experts are small, and their logarithms far from 0."""
    case = Case(E=64, K=4, dtype=dtype)
    inputs = case.inputs()
    inputs["weights"] = inputs["weights"] / 500
    assert relative(case.outputs(case.lowered(contrib.lower), inputs), case.expected(**inputs)) < HALF[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 2])
def test_node(dtype, K):
    """bfloat16 has no kernel on the CPU: there the file is all that can be looked at."""
    model = Case("silu", gated=True, dtype=dtype, K=K).lowered(contrib.lower)
    checked = proto(model)
    node = find(model, "MoE")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "k": K,
        "activation_type": "swiglu",
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
    }
    assert len(node.inputs) == 6  # no fc3
    floats = {value.data_type for value in checked.graph.initializer if value.data_type != ir.DataType.INT64}
    single = {ir.DataType.FLOAT} if K > 1 else set()  # the floor under logarithms
    assert floats == {node.outputs[0].dtype} | single
    assert not [node.op_type for node in model.graph if node.domain == "moeify"]


def test_weights_are_not_copied_before_the_file_is_written():
    case = Case("silu", gated=True)
    source = case.neutral()
    down = source.model.graph.initializers["experts.down"].const_value.numpy()
    model = case.lowered(contrib.lower)
    made = model.graph.initializers
    assert isinstance(made["experts.up.swiglu"].const_value, ir.LazyTensor)
    assert made["experts.down"].const_value.numpy().shape == down.shape
    assert "experts.up" not in made
    assert "experts.gate" not in made


def test_two_calls_share_their_weights():
    made = programs.shared_weights()
    activation_of(made, "gelu_tanh")
    routed(made)
    scatter(made)
    model = end_to_end(made, contrib.lower)
    calls = [node for node in model.graph.node if node.op_type == "MoE"]
    assert len(calls) == 2
    assert calls[0].input[2:] == calls[1].input[2:]
    ids = torch.randint(40, (3, 4))
    assert relative(torch.from_numpy(session(model).run(None, {"x": ids.numpy()})[0]), made.run(ids)) < CLOSE


@pytest.mark.parametrize(
    ("case", "provider", "reason"),
    [
        (Case("relu2"), "cpu", "com.microsoft.MoE has no activation relu2"),
        (Case("gelu", gated=True), "cpu", "com.microsoft.MoE has no gated gelu"),
        (Case("identity", gated=True), "cuda", "com.microsoft.MoE has no gated identity"),
        (Case(O=12), "cpu", "com.microsoft.MoE gives as many columns as it reads, not 12 for 16"),
        (Case(dtype=torch.bfloat16), "cpu", "com.microsoft.MoE has no bfloat16 kernel on cpu"),
        (Case(dtype=torch.float64), "cuda", "com.microsoft.MoE has no double kernel on cuda"),
        (
            Case(dtype=torch.float16, F=20),
            "cuda",
            "com.microsoft.MoE on cuda needs a hidden width of at least 16 that 8 divides, not 20",
        ),
        (Case(D=18, F=16), "cuda", "com.microsoft.MoE on cuda needs a width of at least 16 that 4 divides, not 18"),
        (Case(F=8), "cuda", "com.microsoft.MoE on cuda needs a hidden width of at least 16 that 4 divides, not 8"),
        (Case(F=20), "cuda", None),
        (Case(F=20), "cpu", None),
        (Case("silu", gated=True, dtype=torch.bfloat16, F=24), "cuda", None),
    ],
)
def test_unfit(case, provider, reason):
    assert contrib.unfit(case.mixture(), provider) == reason


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", TABLE)
def test_every_activation_is_right_or_refused(activation, gated):
    case = Case(activation, gated=gated)
    if contrib.unfit(case.mixture(), "cpu") is None:
        inputs = case.inputs()
        error = relative(case.outputs(case.lowered(contrib.lower), inputs), case.expected(**inputs))
        assert error < CLOSE + contrib.approximation(case.mixture())


def test_approximation_bounds_the_two_forms_of_gelu():
    u = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    gap = float((lookup("gelu")(u) - lookup("gelu_tanh")(u)).abs().max())
    claimed = contrib.approximation(Case("gelu").mixture())
    assert 0.9 * claimed < gap < claimed
    assert contrib.approximation(Case("gelu_tanh").mixture()) == 0
    assert contrib.approximation(Case("gelu_tanh", dtype=torch.float16).mixture()) == claimed
    assert contrib.approximation(Case("silu", gated=True).mixture()) == 0


def test_inputs_are_left_as_they_were():
    case = Case()
    inputs = case.inputs()
    before = arrays(inputs)["x"].copy()
    case.outputs(case.lowered(contrib.lower), inputs)
    assert (arrays(inputs)["x"] == before).all()
