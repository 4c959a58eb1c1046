"""Which lowering is chosen, and in which words."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import pytest

from moeify.backends.onnxruntime import choose, contrib, cost, measure, qmoe
from moeify.backends.onnxruntime.backend import OnnxRuntime
from moeify.backends.onnxruntime.choose import CONTRIB, KERNEL, QMOE, SPLIT, chooser
from moeify.backends.onnxruntime.mixture import Mixture, Shape
from moeify.errors import BadOption, Refused, UnknownName

SHAPE = Shape(4, 64, 64, 64, 2)
cpu = functools.partial(chooser, "cpu", tokens=128, threads=2, dtype="float32", tolerance=1e-4)


def mixture(activation: str = "silu", *, gated: bool = False, shape: Shape = SHAPE) -> Mixture:
    return measure.synthetic(shape, gated=gated, bias=False, activation=activation)


def timed(split: float, other: float, **kernel: float) -> choose.Measured:
    def times(one: Mixture, names: Sequence[str]) -> Mapping[str, float]:
        taken = {SPLIT: split, CONTRIB: other, **kernel}
        assert set(names) == set(taken)
        return taken

    return times


@pytest.mark.parametrize("target", ["cpu", "cuda", "portable"])
def test_every_name_has_a_lowering(target: str) -> None:
    assert tuple(OnnxRuntime(target=target)._table()) == choose.NAMES


def test_the_cpu_takes_what_the_cost_model_expects_to_be_faster() -> None:
    big = mixture(shape=Shape(8, 256, 128, 256, 2))
    expected = {name: cost.seconds(name, big.shape, False, 128, 2) for name in (SPLIT, CONTRIB)}
    found = cpu()(big)
    assert found.lowering == min(expected, key=lambda name: expected[name])
    assert found.why.endswith("expected at 128 tokens on 2 threads")


@pytest.mark.parametrize(
    ("split", "other", "lowering", "why"),
    [
        (1.0, 2.0, SPLIT, "2.00 x as fast as com.microsoft.MoE, measured at 128 tokens"),
        (2.0, 1.0, CONTRIB, "2.00 x as fast as split, measured at 128 tokens"),
        (1.0, 0.97, SPLIT, "exact, and com.microsoft.MoE gains less than 5%, measured at 128 tokens"),
    ],
)
def test_measured_times_decide(split: float, other: float, lowering: str, why: str) -> None:
    found = cpu(measured=timed(split, other))(mixture())
    assert (found.lowering, found.why) == (lowering, why)


@pytest.mark.parametrize(
    ("kernel", "lowering", "why"),
    [
        (0.5, KERNEL, "4.00 x as fast as split, measured at 128 tokens"),
        (1.5, CONTRIB, "2.00 x as fast as split, measured at 128 tokens"),
    ],
)
def test_with_the_library_the_kernel_is_one_of_them(kernel: float, lowering: str, why: str) -> None:
    found = cpu(has_library=True, measured=timed(2.0, 1.0, kernel=kernel))(mixture())
    assert (found.lowering, found.why) == (lowering, why)
    assert cpu(measured=timed(2.0, 1.0))(mixture()).lowering == CONTRIB


def test_the_kernel_is_weighed_alone_where_the_operator_does_not_fit() -> None:
    def times(one: Mixture, names: Sequence[str]) -> Mapping[str, float]:
        assert tuple(names) == (SPLIT, KERNEL)
        return {SPLIT: 1.0, KERNEL: 0.5}

    assert cpu(has_library=True, measured=times)(mixture("relu2")).lowering == KERNEL
    found = cpu(has_library=True, measured=times)(mixture("mish"))
    assert (found.lowering, found.why) == (
        SPLIT,
        "the kernel has no activation mish; com.microsoft.MoE has no activation mish",
    )


def test_a_type_for_the_experts_asks_for_the_kernel_with_or_without_its_library() -> None:
    found = cpu(storage="int8")(mixture("gelu"))
    assert (found.lowering, found.why) == (KERNEL, "int8 experts were asked for")
    found = cpu(storage="int8")(mixture("mish"))
    assert (found.lowering, found.why) == (SPLIT, "the kernel has no activation mish")


def test_what_the_operator_cannot_express_is_split_with_its_reason() -> None:
    one = mixture("relu2")
    found = cpu(measured=timed(2.0, 1.0))(one)
    assert (found.lowering, found.why) == (SPLIT, contrib.unfit(one, "cpu"))


def test_an_approximation_above_the_tolerance_is_split() -> None:
    found = cpu(measured=timed(2.0, 1.0))(mixture("gelu"))
    assert (found.lowering, found.why) == (
        SPLIT,
        "com.microsoft.MoE computes gelu with an error of 5e-04, above 1e-04",
    )
    assert cpu(measured=timed(2.0, 1.0), tolerance=1e-3)(mixture("gelu")).lowering == CONTRIB


@pytest.mark.parametrize("target", ["cuda", "portable"])
def test_other_targets_take_the_fused_operator_where_it_fits(target: str) -> None:
    choice = chooser(target, tokens=128, threads=None, dtype="float32", tolerance=1e-4)
    assert choice(mixture()).lowering == CONTRIB
    assert choice(mixture("relu2")).lowering == SPLIT


def test_bits_take_qmoe_or_say_why_not() -> None:
    choice = chooser("portable", tokens=128, threads=None, dtype="float32", bits=8, tolerance=1e-4)
    found = choice(mixture())
    assert (found.lowering, found.why) == (
        SPLIT,
        "com.microsoft.QMoE is ONNX Runtime's alone, and the file is to run elsewhere",
    )
    one = mixture("relu2")
    found = chooser("cuda", tokens=128, threads=None, dtype="float32", bits=8, tolerance=1e-4)(one)
    assert (found.lowering, found.why) == (SPLIT, qmoe.unfit(one, "cuda", 8, None))


def test_forced() -> None:
    assert cpu(forced=SPLIT)(mixture()).lowering == SPLIT
    assert cpu(forced=CONTRIB)(mixture()).lowering == CONTRIB
    assert cpu(forced=KERNEL)(mixture()).lowering == KERNEL
    with pytest.raises(Refused, match="the kernel lowering cannot take this block: the kernel has no activation mish"):
        cpu(forced=KERNEL)(mixture("mish"))
    with pytest.raises(Refused, match="the kernel library is for the CPU"):
        chooser("cuda", tokens=1, threads=None, dtype="float32", tolerance=1e-4, forced=KERNEL)(mixture())
    with pytest.raises(Refused) as caught:
        cpu(forced=CONTRIB)(mixture("relu2"))
    assert str(caught.value) == (
        f"the com.microsoft.MoE lowering cannot take this block: {contrib.unfit(mixture('relu2'), 'cpu')}\n"
        "  at: block\n"
        "  hint: leave the choice open, or force split, which takes every block"
    )


def test_forced_names_that_make_no_sense() -> None:
    with pytest.raises(UnknownName, match="there is no lowering named 'spilt'"):
        cpu(forced="spilt")
    with pytest.raises(BadOption, match=r"com\.microsoft\.QMoE has quantised experts, and no number of bits was given"):
        cpu(forced=QMOE)
    with pytest.raises(Refused, match=r"com\.microsoft\.QMoE is what the number of bits asks for"):
        chooser("cuda", tokens=1, threads=None, dtype="float32", bits=8, tolerance=1e-4, forced=CONTRIB)(mixture())


def test_experts_of_another_type_than_the_model_are_split() -> None:
    found = chooser("cuda", tokens=1, threads=None, dtype="float16", tolerance=1e-4)(mixture())
    assert (found.lowering, found.why) == (SPLIT, "its experts are float, and the model is float16")
