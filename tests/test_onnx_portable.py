"""The portable lowering: one file; ONNX Runtime runs its kernel, other runtimes the body of the function."""

from __future__ import annotations

import dataclasses
import json

import onnx
import onnx.inliner
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from moeify.backends.deploy import Choice
from moeify.backends.onnxruntime import contrib, portable, split
from moeify.backends.onnxruntime.lowering import lower, neutral
from moeify.backends.onnxruntime.mixture import Mixture
from tests import programs
from tests.onnx_mixtures import Case, array, arrays, end_to_end, find, proto, relative, scatter, session
from tests.test_onnx_contrib import CLOSE, EXACT, HALF
from tests.test_route import routed

# onnx.reference multiplies and adds in float16, the kernel in float32; bfloat16 has 8 bits where float16 has 11.
BODY = HALF | {torch.float16: 1e-2, torch.bfloat16: 8e-2}


def body(model: onnx.ModelProto, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What onnx.reference computes, which has no kernel of the name."""
    result = ReferenceEvaluator(model).run(None, arrays(inputs, negated="x"))[0]
    return -torch.from_numpy(result.astype("float32"))


def expanded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The file as a runtime sees it that expands functions: standard operators alone."""
    made = onnx.inliner.inline_local_functions(model)
    assert "com.microsoft" not in {node.domain for node in made.graph.node}
    return made


@pytest.mark.parametrize("router", ["softmax-topk", "switch{capacity-factor=0.5}", "hash", "noisy-topk"])
def test_routers_with_the_kernel_and_with_the_body(router, tmp_path):
    made = programs.gated(2, router=router, top_k=1 if router.startswith("switch") else 2)
    routed(made)
    scatter(made)
    model = end_to_end(made, portable.lower)
    assert len(model.functions) == 1
    runtime = session(model, enable_profiling=True, profile_file_prefix=str(tmp_path / "profile"))
    reference = ReferenceEvaluator(model)
    for shape in ((2, 5), (4, 9)):
        ids = torch.randint(40, shape)
        expected = made.run(ids)
        for run in (runtime.run, reference.run):
            assert relative(torch.from_numpy(run(None, {"x": ids.numpy()})[0]), expected) < CLOSE
    with open(runtime.end_profiling()) as file:
        ran = {event["args"].get("op_name") for event in json.load(file) if event.get("cat") == "Node"}
    assert "MoE" in ran
    assert not ran & {"Scan", "NonZero", "GatherND"}  # what the body would be


@pytest.mark.parametrize("case", EXACT, ids=lambda case: f"{case.activation}-{case.gated}")
@pytest.mark.parametrize("bias", [True, False, "up_bias", "down_bias"])
def test_the_body_computes_what_the_kernel_computes(case, bias):
    case = dataclasses.replace(case, bias=bias)
    inputs = case.inputs()
    model = proto(case.lowered(portable.lower))
    expected = case.expected(**inputs)
    assert relative(body(model, inputs), expected) < CLOSE
    for runnable in (model, expanded(model)):
        result = -torch.from_numpy(session(runnable).run(None, arrays(inputs, negated="x"))[0])
        assert relative(result, expected) < CLOSE


@pytest.mark.parametrize(("E", "K"), [(1, 1), (2, 2), (8, 8), (17, 5), (64, 1), (64, 6)])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_counts(E, K, tokens):
    case = Case("silu", gated=True, E=E, K=K)
    inputs = case.inputs(tokens)
    model = proto(case.lowered(portable.lower))
    kernel, by_hand = case.outputs(case.lowered(portable.lower), inputs), body(model, inputs)
    assert kernel.shape == by_hand.shape == (tokens, case.D)
    if tokens:
        assert relative(by_hand, case.expected(**inputs)) < CLOSE
        assert relative(kernel, case.expected(**inputs)) < CLOSE


@pytest.mark.parametrize("K", [1, 3])
def test_weights_of_zero(K):
    case = Case("gelu_tanh", K=K)
    inputs = case.inputs()
    inputs["weights"][0] = 0
    inputs["weights"][1:3, 0] = 0
    result = body(proto(case.lowered(portable.lower)), inputs)
    assert relative(result, case.expected(**inputs)) < CLOSE
    assert not result[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_halves(dtype, activation):
    case = Case(activation, gated=activation == "silu", dtype=dtype)
    inputs = case.inputs()
    model = proto(case.lowered(portable.lower))
    assert relative(body(model, inputs), case.expected(**inputs)) < BODY[dtype]
    if dtype == torch.float16:
        assert relative(case.outputs(case.lowered(portable.lower), inputs), case.expected(**inputs)) < HALF[dtype]


def test_erf_gelu_is_the_tanh_form_in_both():
    """The kernel has no other; what that costs is said by ``approximation``."""
    case = Case("gelu")
    inputs = case.inputs()
    kernel = case.outputs(case.lowered(portable.lower), inputs)
    by_hand = body(proto(case.lowered(portable.lower)), inputs)
    assert relative(by_hand, kernel.double()) < CLOSE
    error = relative(by_hand, case.expected(**inputs))
    assert CLOSE < error < portable.approximation(case.mixture())


def test_weights_are_those_of_the_graph():
    """One copy: the function has no constants of its own size."""
    model = proto(Case("silu", gated=True).lowered(portable.lower))
    assert len(model.functions[0].SerializeToString()) < 4000
    names = [value.name for value in model.graph.initializer]
    assert sorted(name for name in names if name.startswith("experts.")) == [
        "experts.down",
        "experts.down_bias",
        "experts.up.swiglu",
        "experts.up_bias.swiglu",
    ]


def test_absent_biases_are_zeros():
    model = Case(bias=False, F=24).lowered(portable.lower)
    biases = [find(model, "MoE").inputs[i].const_value for i in (3, 5)]
    assert [list(bias.shape) for bias in biases] == [[4, 24], [4, 16]]
    assert not any(bias.numpy().any() for bias in biases)


def test_a_second_activation_is_unfit():
    """A model has one function of the name; the block of the other activation goes elsewhere, and both are right."""
    made = programs.program([programs.Ffn(activation="relu"), programs.Ffn(gated=True, activation="silu")])
    routed(made)
    scatter(made)
    reasons = []

    def choose(mixture: Mixture) -> Choice:
        reasons.append(portable.unfit(mixture, "cpu"))
        return Choice("split" if reasons[-1] else "portable", reasons[-1] or "it fits")

    result = lower(neutral(made), choose, {"portable": portable.lower, "split": split.lower})
    assert reasons == [None, "the model's function com.microsoft::MoE computes relu, and this block needs swiglu"]
    model = proto(result.model)
    ids = torch.randint(40, (3, 5))
    for run in (session(model).run, ReferenceEvaluator(model).run):
        assert relative(torch.from_numpy(run(None, {"x": array(ids)})[0]), made.run(ids)) < CLOSE


@pytest.mark.parametrize("case", [Case("relu2"), Case("gelu", gated=True), Case(O=12), Case(dtype=torch.float64)])
def test_what_the_kernel_cannot_do_is_unfit(case):
    assert portable.unfit(case.mixture(), "cpu") == contrib.unfit(case.mixture(), "cpu") is not None
    assert portable.unfit(Case().mixture(), "cpu") is None
