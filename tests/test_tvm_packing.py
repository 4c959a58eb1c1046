"""Weights packed in panels, and unpacked again."""

from __future__ import annotations

import pytest
import torch

from moeify.backends.tvm.cpu import packing
from moeify.errors import Refused


@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_panels(outputs: int, stack: tuple[int, ...]) -> None:
    weight = torch.randn(*stack, outputs, 5)
    packed = packing.panels(weight, 8)
    assert packed.shape == (*stack, packing.count(outputs, 8), 5, 8)
    assert packed.is_contiguous()
    unpacked = packed.transpose(-1, -2).flatten(-3, -2)
    assert torch.equal(unpacked[..., :outputs, :], weight)
    assert not unpacked[..., outputs:, :].any()


def test_gate_and_up_share_panels() -> None:
    gate, up = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    packed = packing.gated_panels(gate, up, 8)
    assert packed.shape == (2, 2, 5, 8)
    assert torch.equal(packed[1, 1, :, 0], gate[1, 4])
    assert torch.equal(packed[1, 1, :, 5], up[1, 5])
    assert not packed[:, 1, :, [2, 3, 6, 7]].any()
    bias = packing.gated_biases(gate[..., 0], up[..., 0], 8)
    assert torch.equal(bias.view(2, 2, 8), packed[:, :, 0])


def test_padded() -> None:
    assert packing.padded(torch.ones(2, 3), 4).tolist() == [[1.0, 1.0, 1.0, 0.0]] * 2
    assert packing.padded(torch.ones(4), 4).tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", packing.STORED)
def test_stored(dtype: torch.dtype) -> None:
    value = torch.randn(10)
    stored = packing.stored(value, dtype)
    assert stored.dtype == packing.stored_dtype(dtype)
    assert torch.equal(stored.view(dtype), value.to(dtype))


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(Refused) as error:
        packing.stored(torch.tensor([1.0, -70000.0]), torch.float16, "layer.experts.up")
    assert str(error.value) == (
        "a weight of 70000 is beyond the 65504 of float16\n"
        "  at: layer.experts.up\n"
        "  hint: bfloat16 has the range of float32"
    )
    assert packing.stored(torch.tensor([float("inf")]), torch.float16).isinf()
