"""``moe.*`` on a GPU: values and gradients are those of the CPU in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moeify.ir import kernels_grouped
from tests.gpu import GPU, needs_gpu, relative

moe = torch.ops.moeify
T, E, K = 70, 4, 2

pytestmark = needs_gpu


def routing(lacking: bool) -> Tensor:
    """Expert 2 gets nothing, token 0 chooses expert 1 twice; ``lacking`` leaves slots without an expert."""
    experts = torch.tensor([0, 1, 3])[torch.randint(0, 3, (T, K))]
    experts[0] = 1
    if lacking:
        experts[3:9] = E
        experts[10:30, 1] = E
    return experts


def operands(dtype: torch.dtype, width: int, hidden: int, gated: bool, biased: bool) -> list[Tensor | None]:
    """x, gates and the stacked weights, in float64 but with values that ``dtype`` holds exactly."""
    shapes = [(T, width), (T, K), (E, hidden, width), (E, hidden, width), (E, width, hidden)]
    shapes += [(E, hidden), (E, hidden), (E, width)]
    there = [True, True, True, gated, True, biased, gated and biased, biased]
    scales = [1, 1, width**-0.5, width**-0.5, hidden**-0.5, 1, 1, 1]
    made = [(torch.randn(shape) * scale).to(dtype).double() for shape, scale in zip(shapes, scales)]
    return [value if yes else None for value, yes in zip(made, there)]


def run(values: list[Tensor | None], experts: Tensor, activation: str, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all operands."""
    leaves = [None if value is None else value.detach().clone().requires_grad_() for value in values]
    x, gates, *weights = leaves
    out = moe.dispatch_ffn(x, experts, gates, *weights, activation)
    out.backward(grad)
    return [out, *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(64, 96), (60, 20)], ids=["aligned", "odd"])
@pytest.mark.parametrize("lacking", [False, True], ids=["", "lacking"])
def test_values_and_gradients(dtype: torch.dtype, width: int, hidden: int, lacking: bool) -> None:
    taken = set()
    for gated, biased in itertools.product([False, True], repeat=2):
        values, experts = operands(dtype, width, hidden, gated, biased), routing(lacking)
        grad = torch.randn(T, width).to(dtype).double()
        expected = run(values, experts, "silu", grad)
        there: list[Any] = [None if value is None else value.to(GPU, dtype) for value in values]
        taken.add(kernels_grouped.fits(there[0], *there[2:]))
        actual = run(there, experts.to(GPU), "silu", grad.to(GPU, dtype))
        assert len(actual) == len(expected)
        for number, (value, right) in enumerate(zip(actual, expected)):
            # Each of the three stages rounds once to dtype, the gradients' stages likewise; float32 sums T*K terms.
            assert relative(value, right) < 8 * torch.finfo(dtype).eps, (gated, biased, number)
    assert taken == {dtype == torch.bfloat16 and width == 64}  # both paths are here: grouped GEMM, and the loop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens_at_all(dtype: torch.dtype) -> None:
    x = torch.zeros(0, 64, device=GPU, dtype=dtype, requires_grad=True)
    weights = [torch.randn(E, 32, 64), None, torch.randn(E, 64, 32), None, None, None]
    there: list[Any] = [None if one is None else one.to(GPU, dtype).requires_grad_() for one in weights]
    experts = torch.zeros(0, K, dtype=torch.int64, device=GPU)
    out = moe.dispatch_ffn(x, experts, torch.zeros(0, K, device=GPU, dtype=dtype), *there, "relu")
    out.sum().backward()
    assert out.shape == (0, 64)
    assert not there[0].grad.any()


def test_the_same_twice() -> None:
    """Nothing of the forward pass depends on the order in which the GPU's threads end."""
    for dtype in (torch.float32, torch.bfloat16):
        values, experts = operands(dtype, 64, 96, True, True), routing(False).to(GPU)
        x, gates, *weights = [None if value is None else value.to(GPU, dtype) for value in values]
        first, *others = [moe.dispatch_ffn(x, experts, gates, *weights, "gelu") for _ in range(4)]
        assert all(torch.equal(first, other) for other in others)


def test_groups_of_ranks() -> None:
    """The permutations around an exchange, and the assignments that balance, equal the CPU's."""
    rows, counts = torch.randn(12, 8), torch.tensor([[3, 0, 2], [1, 4, 2]])
    there = moe.transpose_groups(rows.to(GPU), counts.to(GPU))
    assert torch.equal(there.cpu(), moe.transpose_groups(rows, counts))
    scores = torch.randn(24, 4)
    for call in (moe.balanced_assignment, lambda values, train: moe.sinkhorn(values, 0.5, 20, train)):
        torch.testing.assert_close(call(scores.to(GPU), True).cpu(), call(scores, True))
