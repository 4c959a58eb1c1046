"""The qmoe lowering: the packing is what the runtime reads, at 4 and 8 bits, with and without blocks."""

from __future__ import annotations

import numpy
import onnx_ir as ir
import pytest
import torch

from moeify.backends.onnxruntime import qmoe
from tests import programs
from tests.onnx_mixtures import TYPES, Case, array, end_to_end, find, proto, relative, scatter, session
from tests.test_onnx_contrib import CLOSE, HALF
from tests.test_route import routed

WIDE = {"D": 128, "F": 64}
CASES = [Case("relu", **WIDE), Case("gelu_tanh", **WIDE), Case("silu", gated=True, **WIDE)]
SCHEMES = [(4, None), (4, 32), (4, 64), (8, None)]


def lowering(bits: int, block: int | None):
    return lambda emit, mixture: qmoe.lower(emit, mixture, bits=bits, block=block)


def read_back(case: Case, bits: int, block: int | None) -> dict[str, torch.Tensor]:
    """The case's weights as the runtime reads them."""
    made = case.stacked()
    for role in {"up", "gate", "down"} & made.keys():
        experts = []
        for rows in made[role]:
            packed, scales = qmoe.quantise(array(rows), bits, block, TYPES[case.dtype])
            experts.append(torch.from_numpy(qmoe.dequantise(packed, scales, bits)))
        made[role] = torch.stack(experts)
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.activation)
@pytest.mark.parametrize(("bits", "block"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_runtime_reads_what_was_written(case, bits, block, dtype):
    case = Case(case.activation, case.gated, dtype=dtype, **WIDE)
    assert qmoe.unfit(case.mixture(), "cpu", bits, block) is None
    inputs = case.inputs()
    result = case.outputs(case.lowered(lowering(bits, block)), inputs)
    assert relative(result, case.expected(**inputs, stacked=read_back(case, bits, block))) < HALF[dtype]
    # Far from the weights before, or nothing was quantised.
    assert relative(result, case.expected(**inputs)) > 10 * CLOSE


@pytest.mark.parametrize("router", ["softmax-topk{renormalise=false}", "switch"])
def test_routers(router, monkeypatch):
    monkeypatch.setattr(programs, "D", 32)
    monkeypatch.setattr(programs, "F", 64)
    layer = programs.Ffn(gated=True, bias=False, activation="silu")
    made = programs.program([layer])
    made.recipe = programs.Recipe(router=router, top_k=1 if router == "switch" else 2)
    routed(made)
    scatter(made)
    model = end_to_end(made, lowering(4, 32))
    with torch.no_grad():
        for name, value in made.graph_module.named_parameters():
            if name.rpartition(".")[2] in ("up", "gate", "down") and ".experts." in name:
                for rows in value:
                    quantised = qmoe.quantise(rows.numpy(), 4, 32, ir.DataType.FLOAT)
                    rows.copy_(torch.from_numpy(qmoe.dequantise(*quantised, 4)))
    ids = torch.randint(40, (4, 9))
    assert relative(torch.from_numpy(session(model).run(None, {"x": ids.numpy()})[0]), made.run(ids)) < CLOSE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [None, 32])
def test_the_error_of_a_weight_is_half_a_step(bits, block):
    rows = torch.randn(6, 64).numpy()
    packed, scales = qmoe.quantise(rows, bits, block, ir.DataType.FLOAT)
    assert packed.dtype == numpy.uint8
    assert packed.shape == (6, 64 * bits // 8)
    assert scales.shape == ((6,) if block is None else (6, 2))
    step = numpy.abs(scales.reshape(6, -1)).repeat(64 if block is None else block, axis=1)
    error = numpy.abs(qmoe.dequantise(packed, scales, bits) - rows)
    # The largest weight is exact; one as large of the other sign has no q and loses a whole step.
    assert (error <= step * (1 + 1e-5)).all()
    inside = numpy.abs(rows) <= step * (2 ** (bits - 1) - 1.5)
    assert (error <= step * 0.5 * (1 + 1e-5))[inside].all()
    assert inside.mean() > 0.6


def test_rows_of_zeros_stay_zeros():
    rows = numpy.zeros((2, 64), dtype=numpy.float32)
    rows[1, 0] = 1.0
    packed, scales = qmoe.quantise(rows, 4, 32, ir.DataType.FLOAT16)
    assert (qmoe.dequantise(packed, scales, 4) == rows).all()


def test_the_lower_half_of_a_byte_comes_first():
    rows = numpy.array([[-8.0, 3.0, 0.0, -2.0]], dtype=numpy.float32)
    packed, scales = qmoe.quantise(rows, 4, None, ir.DataType.FLOAT)
    assert scales.tolist() == [1.0]
    assert packed.tolist() == [[0 | 11 << 4, 8 | 6 << 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "block"), [*SCHEMES, (8, 64)])
def test_node(dtype, bits, block):
    model = Case("silu", gated=True, dtype=dtype, **WIDE).lowered(lowering(bits, block))
    proto(model)
    node = find(model, "QMoE")
    expected = {
        "k": 2,
        "activation_type": "swiglu",
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "expert_weight_bits": bits,
        "quant_type": "int",
        "weights_prepacked": 0,
    }
    expected |= {} if block is None else {"block_size": block}
    assert {name: attribute.value for name, attribute in node.attributes.items()} == expected
    assert len(node.inputs) == 8  # no zero points, no router_weights
    _, _, fc1, fc1_scales, fc1_bias, fc2, fc2_scales, _ = node.inputs
    per = {} if block is None else {"fc1": (128 // block,), "fc2": (64 // block,)}
    assert list(fc1.shape) == [4, 128, 128 * bits // 8]
    assert list(fc2.shape) == [4, 128, 64 * bits // 8]
    assert list(fc1_scales.shape) == [4, 128, *per.get("fc1", ())]
    assert list(fc2_scales.shape) == [4, 128, *per.get("fc2", ())]
    assert fc1.dtype == fc2.dtype == ir.DataType.UINT8
    assert fc1_scales.dtype == fc2_scales.dtype == fc1_bias.dtype == TYPES[dtype]
    assert all(isinstance(value.const_value, ir.LazyTensor) for value in (fc1, fc1_scales, fc2, fc2_scales))
    assert not {"experts.up", "experts.gate", "experts.down"} & model.graph.initializers.keys()


@pytest.mark.parametrize(
    ("case", "provider", "bits", "block", "reason"),
    [
        (Case(**WIDE), "cpu", 2, None, "com.microsoft.QMoE takes weights of 4 or 8 bits, not 2"),
        (Case(**WIDE), "cpu", 4, 16, "com.microsoft.QMoE takes blocks of 32, 64 or 128 weights, not 16"),
        (Case("relu2", **WIDE), "cpu", 4, 32, "com.microsoft.QMoE has no activation relu2"),
        (
            Case(**WIDE),
            "cuda",
            8,
            None,
            "com.microsoft.QMoE on cuda takes float16 or bfloat16 activations, and puts float32 on the cpu unasked",
        ),
        (
            Case(**WIDE),
            "cpu",
            8,
            64,
            "com.microsoft.QMoE on cpu rounds activations to 8 bits where int8 weights have blocks",
        ),
        (
            Case(D=96, F=64, dtype=torch.float16),
            "cuda",
            4,
            32,
            "com.microsoft.QMoE takes a width that 64 divides here, not 96",
        ),
        (
            Case(D=128, F=64, dtype=torch.float16),
            "cuda",
            4,
            128,
            "com.microsoft.QMoE takes a hidden width that 128 divides here, not 64",
        ),
        (Case(D=15, F=8), "cpu", 4, None, "com.microsoft.QMoE takes a width that 2 divides here, not 15"),
        (Case(dtype=torch.bfloat16, **WIDE), "cuda", 8, 64, None),
        (Case(D=96, F=32), "cpu", 4, 32, None),
        (Case(D=15, F=9), "cpu", 8, None, None),
    ],
)
def test_unfit(case, provider, bits, block, reason):
    assert qmoe.unfit(case.mixture(), provider, bits, block) == reason
