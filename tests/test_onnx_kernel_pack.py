"""kernel_pack: panels of expert weights, and back."""

from __future__ import annotations

import numpy
import pytest

from moeify.backends.onnxruntime.kernel_names import EXPERT_DTYPES
from moeify.backends.onnxruntime.kernel_pack import BLOCKS, STORAGES, pack, panel_count, scale_count, unpack
from moeify.errors import BadOption, Refused, UnknownName


def weights(width: int, depth: int) -> numpy.ndarray:
    return numpy.random.default_rng(0).standard_normal((3, width, depth), dtype=numpy.float32)


def test_users_can_name_all_that_can_be_packed() -> None:
    whole = {(name, 0) for name in STORAGES}
    assert set(EXPERT_DTYPES.values()) == whole | {("int8", block) for block in BLOCKS}


@pytest.mark.parametrize("width", [1, 16, 37])
def test_layout_is_that_of_the_native_kernels(width: int) -> None:
    weight = weights(width, 21)
    panels = pack(weight).panels
    assert panels.shape == (3, panel_count(width), 21, 16)
    for row in range(panel_count(width) * 16):
        wanted = weight[:, row] if row < width else 0
        assert (panels[:, row // 16, :, row % 16] == wanted).all()


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_floats_are_rounded_once(storage: str) -> None:
    weight = weights(37, 21)
    packed = pack(weight, storage)
    assert packed.scales is None
    assert packed.panels.dtype == STORAGES[storage]
    assert (unpack(packed) == weight.astype(STORAGES[storage]).astype(numpy.float32)).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_int8_is_half_a_step_off_at_most(block: int) -> None:
    weight = weights(37, 150)
    weight[1, 5] = 0  # a row without a scale
    packed = pack(weight, "int8", block)
    assert packed.scales is not None
    assert packed.scales.shape == (3, 3, scale_count(150, block), 16)
    scales = packed.scales.transpose(0, 1, 3, 2).reshape(3, 48, -1)[:, :37]
    steps = scales.repeat(block or 150, axis=2)[:, :, :150]
    # Half a step, and the rounding of the quotient in float32.
    assert (numpy.abs(unpack(packed) - weight) <= steps * 0.50001).all()
    assert numpy.abs(packed.panels).max() == 127


def test_a_weight_that_float16_does_not_reach_is_refused() -> None:
    weight = weights(4, 4)
    weight[2, 0, 0] = -70000
    with pytest.raises(Refused) as refusal:
        pack(weight, "float16")
    assert str(refusal.value) == (
        "a weight of expert 2 is 7e+04, and float16 ends at 65504\n  hint: store the experts in bfloat16 or int8"
    )


def test_options_that_do_not_exist() -> None:
    with pytest.raises(UnknownName, match="there is no expert storage named 'float8'"):
        pack(weights(4, 4), "float8")
    for storage, block in (("int8", 48), ("float16", 32)):
        with pytest.raises(BadOption, match=f"a block of {block} inputs to a scale does not fit {storage}"):
            pack(weights(4, 4), storage, block)
