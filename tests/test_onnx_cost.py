"""The cost model's arithmetic and what it says; no times are asserted."""

from __future__ import annotations

import dataclasses

import pytest

from moeify.backends.onnxruntime import cost
from moeify.backends.onnxruntime.cost import CONTRIB, DENSE, SPLIT, Constants, Kernel
from moeify.backends.onnxruntime.mixture import Shape

SAME = Shape(8, 768, 384, 768, 2)  # the parameters of a dense FFN of 3072
FULL = Shape(8, 768, 3072, 768, 1)
IDEAL = Kernel(call=0.0, expert=0.0, efficiency=1.0, half_rows=0.0, stream=1.0, passes=0.0)


def test_every_lowering_of_the_cpu_has_constants() -> None:
    assert set(cost.MEASURED.kernels) == {DENSE, SPLIT, CONTRIB, cost.KERNEL}


def test_weights_of_an_expert() -> None:
    assert cost.weights_per_expert(Shape(4, 8, 16, 10, 1), gated=False) == 16 * (8 + 10)
    assert cost.weights_per_expert(Shape(4, 8, 16, 10, 1), gated=True) == 16 * (2 * 8 + 10)


def test_touched_is_top_k_for_one_token_and_all_for_many() -> None:
    assert cost.touched(SAME, 1) == pytest.approx(2)
    assert cost.touched(SAME, 2) == pytest.approx(2 + 2 * 6 / 8)
    assert cost.touched(SAME, 1000) == pytest.approx(8)
    assert cost.touched(cost.dense_shape(SAME, 3072), 1) == 1


def test_floor_is_bytes_for_few_tokens_and_flops_for_many() -> None:
    weights = cost.weights_per_expert(SAME, False)
    assert cost.floor(SAME, False, 1, flops=1e12, bandwidth=1e9) == pytest.approx(2 * weights * 4 / 1e9)
    assert cost.floor(SAME, False, 10_000, flops=1e10, bandwidth=1e10) == pytest.approx(2 * weights * 10_000 * 2 / 1e10)
    assert cost.floor(SAME, False, 1, flops=1e12, bandwidth=1e9, weight_bytes=2) == pytest.approx(2 * weights * 2 / 1e9)


@pytest.mark.parametrize("tokens", [1, 16, 2048])
@pytest.mark.parametrize("gated", [False, True])
def test_a_kernel_without_overheads_takes_the_floor(tokens: int, gated: bool) -> None:
    ideal = Constants(5e10, 2e10, {SPLIT: IDEAL})
    floor = cost.floor(SAME, gated, tokens, flops=1e11, bandwidth=2e10)
    assert cost.seconds(SPLIT, SAME, gated, tokens, 2, ideal) == pytest.approx(floor)


def test_each_constant_adds_what_it_says() -> None:
    def seconds(**changes: float) -> float:
        constants = Constants(5e10, 2e10, {SPLIT: dataclasses.replace(IDEAL, **changes)})  # type: ignore[arg-type]
        return cost.seconds(SPLIT, SAME, False, 512, 2, constants)

    ideal = seconds()
    assert seconds(call=1e-3) - ideal == pytest.approx(1e-3)
    assert seconds(expert=1e-3) - ideal == pytest.approx(8e-3)
    assert seconds(efficiency=0.5) == pytest.approx(2 * ideal)
    assert seconds(half_rows=512 * 2 / 8) == pytest.approx(2 * ideal)  # as many as an expert has
    rows = 512 * 2 / 8
    assert seconds(repack=1.0) - ideal == pytest.approx(8 * (1 - 1 / rows) * 4 * 384 * 2 * 768 / 2e10)
    assert seconds(passes=1.0) - ideal == pytest.approx(512 * 2 * 4 * (768 + 384 + 768) / 2e10)


def test_experts_dealt_out_to_threads_leave_some_idle() -> None:
    def seconds(dealt: bool, tokens: int) -> float:
        kernel = dataclasses.replace(IDEAL, half_rows=1e6, expert_to_thread=dealt)
        return cost.seconds(CONTRIB, FULL, False, tokens, 4, Constants(5e10, 2e10, {CONTRIB: kernel}))

    assert seconds(True, 1) == pytest.approx(4 * seconds(False, 1))  # one expert has rows
    assert seconds(True, 1000) == pytest.approx(seconds(False, 1000))


def test_the_dense_block_is_one_expert() -> None:
    assert cost.dense_seconds(SAME, 3072, False, 64, 2) == cost.seconds(
        DENSE, Shape(1, 768, 3072, 768, 1), False, 64, 2
    )


@pytest.mark.parametrize("lowering", [DENSE, SPLIT, CONTRIB])
def test_the_measured_constants_are_above_the_floor_and_grow(lowering: str) -> None:
    constants = cost.MEASURED
    shape = cost.dense_shape(SAME, 3072) if lowering == DENSE else SAME
    taken = [cost.seconds(lowering, shape, False, n, 2) for n in (1, 4, 16, 64, 128, 512, 2048)]
    assert taken == sorted(taken)
    for n, seconds in zip((1, 4, 16, 64, 128, 512, 2048), taken):
        flops = 2 * constants.flops_per_thread
        assert 1 <= seconds / cost.floor(shape, False, n, flops=flops, bandwidth=constants.bandwidth) < 5


@pytest.mark.parametrize("tokens", [16, 64, 128, 512, 2048])
def test_split_wins_from_a_few_rows_on(tokens: int) -> None:
    """What was measured: at 16 tokens and more the contrib operator takes 1.4 x as long and longer."""
    assert cost.seconds(CONTRIB, SAME, False, tokens, 2) > 1.25 * cost.seconds(SPLIT, SAME, False, tokens, 2)


def test_contrib_wins_at_one_token_with_many_small_experts() -> None:
    small = Shape(64, 768, 48, 768, 16)
    assert cost.seconds(CONTRIB, small, False, 1, 2) < cost.seconds(SPLIT, small, False, 1, 2)


@pytest.mark.parametrize("tokens", [1, 16, 128, 2048])
def test_no_warning_where_a_quarter_is_active(tokens: int) -> None:
    assert cost.warning(SAME, 3072, False, tokens, 2) is None


@pytest.mark.parametrize(("tokens", "read"), [(16, "7 experts are read, 7.1"), (64, "8 experts are read, 8.0")])
def test_warning_for_full_size_experts_at_a_few_tokens(tokens: int, read: str) -> None:
    text = cost.warning(FULL, 3072, False, tokens, 2)
    assert text is not None
    assert text.startswith(f"at {tokens} tokens the sparse block takes about ")
    assert text.endswith(f" x the time of the dense one: the weights of {read} x the dense ones")


def test_warning_for_more_active_units_than_the_dense_block_has() -> None:
    text = cost.warning(dataclasses.replace(FULL, top_k=2), 3072, False, 2048, 2)
    assert text is not None
    assert text.endswith(
        " x the time of the dense one: a token goes through 6144 hidden units, the dense block has 3072"
    )


def test_warning_for_overhead() -> None:
    kernels = dict(cost.MEASURED.kernels)
    kernels |= {name: dataclasses.replace(kernels[name], expert=1.0) for name in (SPLIT, CONTRIB)}
    text = cost.warning(SAME, 3072, False, 1, 2, dataclasses.replace(cost.MEASURED, kernels=kernels))
    assert text is not None
    assert text.startswith("at 1 token the sparse block takes about ")
    assert text.endswith("8 experts of 384 are too small to pay for their overhead")
