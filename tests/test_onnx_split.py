"""The split lowering: every router, activation, count and size; what it cuts; no weight is copied."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from moeify.backends.deploy import Choice
from moeify.backends.onnxruntime import split
from moeify.backends.onnxruntime.lowering import lower, neutral
from moeify.backends.onnxruntime.mixture import array
from moeify.errors import NotExportable
from moeify.ir.activations import TABLE
from moeify.passes.lower_experts import LowerExperts
from moeify.pipeline.base import Log
from tests import programs
from tests.onnx_mixtures import Case, proto, relative, scatter, session
from tests.test_route import routed

CLOSE = 1e-6  # sums of a few dozen products, in another order and in float32
ROUTERS = [
    "softmax-topk",
    "softmax-topk{renormalise=false}",
    "noisy-topk",
    "switch",
    "switch{capacity-factor=0.5}",
    "hash",
    "sigmoid-bias{groups=4,top-groups=2}",
    "top-p",
    "sinkhorn",
    "expert-choice",
    "random{inference=average}",
]
BLOCKS = {
    "shared experts with a gate": lambda: programs.gated(shared=2, shared_gate=True, top_k=3),
    "granular, a bias outside": lambda: programs.plain(method="granular", shared=1, top_k=4),
    "one block, two calls": lambda: programs.shared_weights(),
    "activation without a name": lambda: programs.custom(shared=1),
    "norm over the hidden width": lambda: programs.custom(pointwise=False),
    "one expert": lambda: programs.custom(experts=1, top_k=1),
    "dropout of hidden values": lambda: programs.with_dropout(),
    "slots without an expert, activation without a name": lambda: programs.custom(router="top-p", top_k=4, shared=1),
    "slots without an expert, one expert": lambda: programs.gated(
        router="switch{capacity-factor=0.5}", experts=1, top_k=1
    ),
}


def runtime(made):
    """The converted Program in ONNX Runtime."""
    lowered = lower(neutral(made), lambda mixture: Choice("split", "a test"), {"split": split.lower})
    return session(proto(lowered.model))


def check(made, *sizes: tuple[int, int]) -> None:
    """On other sizes than the example's, so that nothing was frozen."""
    running = runtime(made)
    for size in sizes:
        ids = torch.randint(40, size)
        result = torch.from_numpy(running.run(None, {"x": ids.numpy()})[0])
        expected = made.run(ids)
        assert result.shape == expected.shape
        if expected.numel():
            assert relative(result, expected.double()) < CLOSE


@pytest.mark.parametrize("router", ROUTERS)
def test_routers(router):
    made = programs.gated(router=router, top_k=1 if router.startswith("switch") else 3)
    routed(made)
    scatter(made)
    check(made, (2, 5), (4, 9), (1, 1), (0, 5), (3, 0))


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block):
    made = BLOCKS[block]()
    routed(made)
    scatter(made)
    check(made, (2, 5), (4, 9), (1, 1), (0, 5))


@pytest.mark.parametrize("router", ["softmax-topk", "top-p"])
def test_three_steps_with_named_activation(router):
    made = programs.gated(router=router)
    routed(made)
    LowerExperts().apply(made, Log())
    scatter(made)
    check(made, (2, 5), (1, 1))


def test_slots_without_an_expert_reach_no_product():
    """The sizes of the parts, read in the file that runs: those of experts, and what is left."""
    made = programs.gated(router="switch{capacity-factor=0.5}", top_k=1)
    routed(made)
    scatter(made)
    model = lower(neutral(made), lambda mixture: Choice("split", "a test"), {"split": split.lower}).model
    node = next(node for node in model.graph if node.op_type == "Split")
    sizes = node.inputs[1]
    sizes.type, sizes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([9])
    model.graph.outputs.append(sizes)
    found = session(proto(model)).run(None, {"x": torch.randint(40, (4, 9)).numpy()})[1]
    capacity = numpy.ceil(36 / 8 * 0.5)
    assert found[:8].max() == capacity
    assert found[8] == 36 - found[:8].sum() > 0


def test_channels_first():
    made = programs.images(top_k=3)
    routed(made)
    scatter(made)
    running = runtime(made)
    for size in ((2, 8, 4, 5), (3, 8, 2, 7), (1, 8, 1, 1)):
        x = torch.randn(size)
        result = torch.from_numpy(running.run(None, {"x": x.numpy()})[0])
        assert relative(result, made.run(x).double()) < CLOSE


@pytest.mark.parametrize("activation", TABLE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_activations(activation, gated, bias):
    case = Case(activation, gated, bias)
    inputs = case.inputs()
    assert relative(case.outputs(case.lowered(split.lower), inputs), case.expected(**inputs)) < CLOSE


@pytest.mark.parametrize("bias", ["up_bias", "gate_bias", "down_bias"])
def test_one_bias_alone(bias):
    case = Case("silu", gated=True, bias=bias)
    inputs = case.inputs()
    assert relative(case.outputs(case.lowered(split.lower), inputs), case.expected(**inputs)) < CLOSE


@pytest.mark.parametrize(("E", "K"), [(1, 1), (2, 1), (3, 2), (8, 8), (17, 5), (64, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("out", [None, 5])
def test_counts(E, K, tokens, out):
    case = Case("silu", gated=True, E=E, K=K, O=out)
    inputs = case.inputs(tokens)
    result = case.outputs(case.lowered(split.lower), inputs)
    assert result.shape == (tokens, out or case.D)
    if tokens:
        assert relative(result, case.expected(**inputs)) < CLOSE


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_all_tokens_to_one_expert(expert):
    """The others have no rows; a token can also choose one expert twice."""
    case = Case("gelu", K=2)
    inputs = case.inputs() | {"experts": torch.full((6, 2), expert)}
    assert relative(case.outputs(case.lowered(split.lower), inputs), case.expected(**inputs)) < CLOSE


def test_float64_to_its_own_precision():
    case = Case("silu", gated=True, dtype=torch.float64)
    inputs = case.inputs()
    assert relative(case.outputs(case.lowered(split.lower), inputs), case.expected(**inputs)) < 1e-14


def test_float64_without_a_kernel_is_refused():
    with pytest.raises(NotExportable, match="no float64 kernel for the activation gelu"):
        Case("gelu", dtype=torch.float64).lowered(split.lower)


@dataclass(frozen=True)
class Padded(Case):
    """Expert e uses ``used[e]`` of its hidden units, the first ones or (``scattered``) any."""

    used: tuple[int, ...] = (24, 40, 0, 25)
    scattered: bool = False

    def stacked(self) -> dict[str, Tensor]:
        made = super().stacked()
        for e, count in enumerate(self.used):
            generator = torch.Generator().manual_seed(e)
            order = torch.randperm(self.F, generator=generator) if self.scattered else torch.arange(self.F)
            made["down"][e][:, order[count:]] = -0.0 if e % 2 else 0.0
        return made


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_padding_is_cut(scattered, gated, bias):
    case = Padded("sigmoid", gated, bias, F=40, scattered=scattered)  # sigmoid(0) is not 0: a wrong cut shows
    model = case.lowered(split.lower)
    weights = model.graph.initializers
    roles = ["up", "gate"] if gated else ["up"]
    for role in roles:
        # 16 can go from the first, 15 not from the last; of an expert with nothing to say one unit stays.
        sizes = [weights[n].shape[0] for n in _names(weights, role)]
        assert sizes == [24, 40, 1, 40]
    assert [weights[n].shape[1] for n in _names(weights, "down")] == [24, 40, 1, 40]
    inputs = case.inputs()
    assert relative(case.outputs(model, inputs), case.expected(**inputs)) < CLOSE


def test_padding_is_cut_when_it_is_written():
    model = Padded(F=40).lowered(split.lower)
    weights = model.graph.initializers
    assert isinstance(weights["experts.down.0.used"].const_value, ir.LazyTensor)
    assert isinstance(weights["experts.up.0.used"].const_value, ir.LazyTensor)


def test_what_is_cut_in_one_call_is_cut_in_the_next():
    made = programs.shared_weights(experts=2, top_k=1)
    routed(made)
    scatter(made)
    down = made.parameter(next(name for name in dict(made.graph_module.named_parameters()) if name.endswith("down")))
    with torch.no_grad():
        down[0, :, 5:] = 0
    lowered = lower(neutral(made), lambda mixture: Choice("split", "a test"), {"split": split.lower})
    cut = [node for node in lowered.model.graph if any(v and v.name.endswith("down.0.used") for v in node.inputs)]
    assert len(cut) == 2
    running, ids = session(proto(lowered.model)), torch.randint(40, (3, 7))
    result = torch.from_numpy(running.run(None, {"x": ids.numpy()})[0])
    assert relative(result, made.run(ids).double()) < CLOSE


def _names(weights, role: str) -> list[str]:
    return [next(n for n in weights if n.removesuffix(".used") == f"experts.{role}.{e}") for e in range(4)]


@pytest.mark.parametrize("bias", [False, True])
def test_no_weight_is_copied(bias):
    case = dataclasses.replace(Case("silu", gated=True), bias=bias)
    source = case.neutral()
    before = {name: array(value) for name, value in source.model.graph.initializers.items()}
    model = lower(source, lambda mixture: Choice("one", "a test"), {"one": split.lower}).model
    for name, value in model.graph.initializers.items():
        if name.startswith("experts."):
            assert numpy.shares_memory(array(value), before[name.rpartition(".")[0]])
    assert not before.keys() & model.graph.initializers.keys()
