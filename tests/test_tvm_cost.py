"""The cost model of TVM's kernels: arithmetic and what it says; no times are asserted."""

from __future__ import annotations

import dataclasses

import pytest

from moeify.backends import roofline
from moeify.backends.roofline import Kernel, Shape
from moeify.backends.tvm import cost
from moeify.backends.tvm.cost import DENSE, FUSED, Constants

SAME = Shape(8, 768, 384, 768, 2)  # the parameters of a dense FFN of 3072
FULL = Shape(8, 768, 3072, 768, 1)
IDEAL = Kernel(call=0.0, expert=0.0, efficiency=1.0, half_rows=0.0, stream=1.0, passes=0.0)
EVEN = Constants(5e10, 2e10, {DENSE: IDEAL, FUSED: IDEAL})
BLOCK = {"experts": 8, "d_model": 768, "d_expert": 3072, "d_ff": 3072, "top_k": 1, "gated": False}


def test_both_forms_have_constants() -> None:
    assert set(cost.MEASURED.kernels) == {DENSE, FUSED}


@pytest.mark.parametrize("tokens", [1, 16, 2048])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4.0), ("float16", 2.0), ("bfloat16", 2.0)])
def test_a_kernel_without_overheads_takes_the_floor(tokens: int, dtype: str, size: float) -> None:
    floor = roofline.floor(SAME, True, tokens, flops=1e11, bandwidth=2e10, weight_bytes=size)
    assert cost.seconds(FUSED, SAME, True, tokens, 2, EVEN, dtype=dtype) == pytest.approx(floor)


@pytest.mark.parametrize("lowering", [DENSE, FUSED])
def test_the_measured_constants_are_above_the_floor_and_grow(lowering: str) -> None:
    constants = cost.MEASURED
    shape = roofline.dense_shape(SAME, 3072) if lowering == DENSE else SAME
    taken = [cost.seconds(lowering, shape, False, n, 2) for n in (1, 4, 16, 64, 128, 512, 2048)]
    assert taken == sorted(taken)
    for n, seconds in zip((1, 4, 16, 64, 128, 512, 2048), taken):
        floor = roofline.floor(
            shape, False, n, flops=2 * constants.flops_per_thread, bandwidth=2 * constants.bandwidth
        )  # weights that stay in the cache come faster than memory gives them
        assert 1 <= seconds / floor < 5


def test_the_warning_is_of_the_block() -> None:
    assert cost.warning(SAME, 3072, False, 128, 2, EVEN) is None
    text = cost.warning(FULL, 3072, False, 16, 2, EVEN)
    assert text is not None
    assert text.startswith("at 16 tokens the sparse block takes about ")
    assert text.endswith("the weights of 7 experts are read, 7.1 x the dense ones")
    more = cost.warning(dataclasses.replace(FULL, top_k=2), 3072, False, 2048, 2, EVEN)
    assert more is not None
    assert more.endswith("a token goes through 6144 hidden units, the dense block has 3072")


def test_half_precision_weights_are_read_in_half_the_time() -> None:
    whole, half = (cost.seconds(FUSED, FULL, False, 4, 2, EVEN, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half == pytest.approx(whole / 2)


def test_of_a_block_in_a_report() -> None:
    assert cost.warning_of(BLOCK, 16, 2) == cost.warning(FULL, 3072, False, 16, 2)
    assert cost.warning_of({**BLOCK, "d_expert": 384}, 128, 2) is None
