"""The attributes that the CUDA provider leaves to the CPU, or gets wrong."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from moeify.backends.onnxruntime import cuda_rules
from moeify.backends.onnxruntime.readiness import Placement
from tests.test_onnx_readiness import BF16, F16, F32, U8, one, value, weight, x


def moe(dtype: ir.DataType = F16, d: int = 64, f: int = 32, fc3: bool = False, **attributes: Any) -> Placement:
    inputs: list[ir.Value | None] = [
        x(dtype, ["n", d]), value("router", dtype, ["n", 4]), weight("fc1", dtype, [4, f, d]), None,
        weight("fc2", dtype, [4, d, f]), None,
    ]  # fmt: skip
    if fc3:
        inputs.append(weight("fc3", dtype, [4, f, d]))
    settings = {"k": 2, "activation_type": "gelu", "normalize_routing_weights": 1} | attributes
    return one("MoE", *inputs, domain="com.microsoft", **settings)


def qmoe(dtype: ir.DataType = F16, d: int = 128, f: int = 64, bits: int = 4, **attributes: Any) -> Placement:
    pack = 8 // bits
    inputs = [
        x(dtype, ["n", d]), value("router", dtype, ["n", 4]),
        weight("fc1", U8, [4, f, d // pack]), weight("s1", dtype, [4, f]), None,
        weight("fc2", U8, [4, d, f // pack]), weight("s2", dtype, [4, d]), None,
    ]  # fmt: skip
    settings = {
        "k": 2, "activation_type": "silu", "normalize_routing_weights": 1, "expert_weight_bits": bits,
        "weights_prepacked": 0,
    }  # fmt: skip
    return one("QMoE", *inputs, domain="com.microsoft", **(settings | attributes))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_mixture_that_fits_says_what_it_needs(dtype: ir.DataType) -> None:
    found = moe(dtype)
    assert (found.provider, found.why, found.matters) == ("cuda", cuda_rules.CAPABILITY, False)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_mixture_that_fits(bits: int) -> None:
    for block in (0, 32, 64, 128):
        found = qmoe(bits=bits, block_size=block)
        assert (found.provider, found.why, found.matters) == ("cuda", cuda_rules.CAPABILITY, False)


def test_a_quantised_mixture_in_float32_lands_on_the_cpu() -> None:
    found = qmoe(F32)
    assert (found.provider, found.matters) == ("cpu", True)
    assert found.why == "the CUDA kernel of QMoE takes no float, only bfloat16, float16"


def test_what_the_fused_operator_would_get_wrong_matters() -> None:
    cases = [
        (moe(normalize_routing_weights=0), "normalize_routing_weights is not 1"),
        (moe(fc3=True), "fc3 is given: the CUDA kernel runs without the gate"),
        (moe(activation_type="swiglu"), "swiglu_fusion is not 1"),
        (moe(activation_type="relu2"), "activation_type = relu2: the kernel has"),
        (moe(F32, d=8), "D = 8 is under 16"),
        (moe(F16, f=20), "F = 20 is no multiple of 8"),
        (qmoe(weights_prepacked=-1), "weights_prepacked is not 0"),
        (qmoe(block_size=16), "block_size = 16: the kernel has 32, 64 and 128"),
        (qmoe(expert_weight_bits=2), "expert_weight_bits = 2"),
        (qmoe(f=96), "F = 96 is no multiple of 64"),
        (qmoe(d=96), "D = 96 is no multiple of 64"),
    ]
    for found, why in cases:
        assert found.why.startswith(why)
        assert (found.provider, found.matters) == ("cuda", True)


def test_swiglu_in_the_layout_of_both_providers_is_right() -> None:
    assert not moe(activation_type="swiglu", swiglu_fusion=1).matters
    assert not moe(F32, f=20).matters  # multiples of 8 are for half precision


@pytest.mark.parametrize(
    ("op", "attributes", "why"),
    [
        ("LSTM", {}, ""),
        ("LSTM", {"clip": 1.0}, "the CUDA kernel of LSTM has no clip"),
        ("LSTM", {"input_forget": 1}, "the CUDA kernel of LSTM has no input_forget"),
        ("LSTM", {"activations": ["Relu"]}, "the CUDA kernel of LSTM has no activations relu"),
        ("LSTM", {"activations": ["Sigmoid", "Tanh", "Tanh"]}, ""),
        ("GRU", {"linear_before_reset": 0}, "the CUDA kernel of GRU has linear_before_reset = 1 only"),
        ("GRU", {"linear_before_reset": 1}, ""),
        ("ConvTranspose", {"pads": [0, 1, 1, 1]}, "ConvTranspose pads unevenly, [0, 1, 1, 1]"),
        ("ConvTranspose", {"auto_pad": "SAME_UPPER"}, "the CUDA provider takes no ConvTranspose of auto_pad SAME"),
        ("ConvTranspose", {"pads": [1, 1, 1, 1]}, ""),
    ],
)  # fmt: skip
def test_attributes_that_are_left_to_the_cpu(op: str, attributes: dict[str, Any], why: str) -> None:
    gates = {"LSTM": 4, "GRU": 3}
    if op in gates:
        inputs = [x(F32, [5, 2, 8])] + [weight(n, F32, [1, gates[op] * 8, 8]) for n in "wr"]
        found = one(op, *inputs, hidden_size=8, **attributes)
    else:
        found = one(op, x(F32, [1, 3, 8, 8]), weight("w", F32, [3, 4, 3, 3]), **attributes)
    assert (found.provider, found.why) == ("cpu" if why else "cuda", why)


# --- the table ----------------------------------------------------------------------------------------------------
