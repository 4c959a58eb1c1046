"""The numbers of ``moe.*`` in eager mode against a plain loop, their edge cases, and what they refuse."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moeify.errors import UnknownName
from moeify.ir import kernels, kernels_grouped, ops
from moeify.ir.activations import TABLE

moe = torch.ops.moeify
T, D, H, E, K, D_OUT = 9, 8, 16, 4, 2, 24


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def routing(tokens: int = T, *, lacking: bool = False) -> torch.Tensor:
    """Expert 2 gets nothing and token 0 chooses expert 1 twice; ``lacking`` leaves six slots without an expert."""
    experts = torch.tensor([0, 1, 3])[torch.randint(0, 3, (tokens, K), generator=torch.Generator().manual_seed(5))]
    experts[:1] = 1
    if lacking:
        experts[3:5] = E
        experts[6:8, 1] = E
    return experts


def stacked(gated: bool, biased: bool, dtype: torch.dtype = torch.float64) -> Any:
    shapes = [(E, H, D), (E, H, D), (E, D_OUT, H), (E, H), (E, H), (E, D_OUT)]
    there = [True, gated, True, biased, gated and biased, biased]
    return [draw(*shape, seed=i, dtype=dtype) if yes else None for i, (shape, yes) in enumerate(zip(shapes, there))]


def reference(x, experts, gates, up, gate, down, up_bias, gate_bias, down_bias, activation):
    """One dense FFN per expert over all tokens, each multiplied by its weight there."""
    y = 0
    for e in range(up.shape[0]):
        hidden = F.linear(x, up[e], None if up_bias is None else up_bias[e])
        if gate is None:
            hidden = TABLE[activation](hidden)
        else:
            hidden = TABLE[activation](F.linear(x, gate[e], None if gate_bias is None else gate_bias[e])) * hidden
        out = F.linear(hidden, down[e], None if down_bias is None else down_bias[e])
        y = y + (gates * (experts == e)).sum(1, keepdim=True) * out
    return y


def fused(x, experts, gates, *weights):
    return moe.dispatch_ffn(x, experts, gates, *weights)


def apart(x, experts, gates, *weights):
    rows, counts, order = moe.permute(x, experts, weights[0].shape[0])
    return moe.unpermute(moe.experts(rows, counts, *weights), order, gates)


def in_pieces(x, experts, gates, up, gate, down, up_bias, gate_bias, down_bias, activation):
    rows, counts, order = moe.permute(x, experts, up.shape[0])
    hidden = moe.grouped_linear(rows, counts, up, up_bias)
    if gate is None:
        hidden = TABLE[activation](hidden)
    else:
        hidden = TABLE[activation](moe.grouped_linear(rows, counts, gate, gate_bias)) * hidden
    return moe.unpermute(moe.grouped_linear(hidden, counts, down, down_bias), order, gates)


@pytest.mark.parametrize("form", [fused, apart, in_pieces])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("lacking", [False, True])
def test_value_and_gradients(form, lacking: bool, gated: bool, biased: bool, activation: str) -> None:
    x, gates = draw(T, D, seed=10), draw(T, K, seed=11)
    arguments: Any = [x, routing(lacking=lacking), gates, *stacked(gated, biased)]
    leaves = [a.requires_grad_() for a in arguments if a is not None and a.is_floating_point()]
    expected, actual = reference(*arguments, activation), form(*arguments, activation)
    torch.testing.assert_close(actual, expected)
    grad = draw(T, D_OUT, seed=12)
    for got, want in zip(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", [fused, apart])
def test_gradients_of_one_argument_at_a_time(form) -> None:
    arguments: Any = [draw(T, D, seed=10), routing(), draw(T, K, seed=11), *stacked(True, True)]
    grad = draw(T, D_OUT, seed=12)
    for i, argument in enumerate(arguments):
        if argument.is_floating_point():
            one = [a.detach().requires_grad_(j == i and a.is_floating_point()) for j, a in enumerate(arguments)]
            (want,) = torch.autograd.grad(reference(*one, "silu"), one[i], grad)
            (got,) = torch.autograd.grad(form(*one, "silu"), one[i], grad)
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", [fused, apart, in_pieces])
def test_no_tokens(form) -> None:
    weights = [w.requires_grad_() for w in stacked(False, True) if w is not None]
    up, down, up_bias, down_bias = weights
    y = form(draw(0, D), routing(0), draw(0, K), up, None, down, up_bias, None, down_bias, "gelu")
    assert y.shape == (0, D_OUT)
    y.sum().backward()
    assert all(not w.grad.any() for w in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [fused, apart])
def test_narrow_types(form, dtype: torch.dtype) -> None:
    arguments: Any = [draw(T, D, seed=10, dtype=dtype), routing(), draw(T, K, seed=11, dtype=dtype)]
    arguments += stacked(True, True, dtype)
    leaves = [a.requires_grad_() for a in arguments if a.is_floating_point()]
    y = form(*arguments, "silu")
    wide = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in arguments]
    expected = reference(*wide, "silu")
    # Three products in a row, each rounded to the type; relative to the largest value.
    bound = 16 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert (y - expected).abs().max() <= bound * expected.abs().max()
    y.sum().backward()
    expected.sum().backward()
    for leaf, twin in zip(leaves, [w for w in wide if w.is_floating_point()]):
        assert leaf.grad.dtype == dtype
        assert (leaf.grad - twin.grad).abs().max() <= bound * twin.grad.abs().max()


@pytest.mark.parametrize("form", [fused, apart, in_pieces])
def test_arguments_of_any_strides(form) -> None:
    arguments: Any = [draw(T, D, seed=10), routing(), draw(T, K, seed=11), *stacked(True, True)]
    expected = form(*arguments, "gelu")
    strided = [a.mT.contiguous().mT if a.dim() > 1 else a for a in arguments]
    assert not any(a.is_contiguous() for a in strided)
    torch.testing.assert_close(form(*strided, "gelu"), expected)


def test_permute_is_stable() -> None:
    x = draw(3, D)
    rows, counts, order = moe.permute(x, torch.tensor([[2, 0], [0, 2], [2, 2]]), 4)
    assert order.tolist() == [1, 2, 0, 3, 4, 5]
    assert counts.tolist() == [2, 0, 4, 0]
    assert torch.equal(rows, x[[0, 1, 0, 1, 2, 2]])


def test_slots_without_an_expert_are_last_and_cost_no_product(monkeypatch) -> None:
    experts = routing(lacking=True)
    rows, counts, order = moe.permute(draw(T, D), experts, E)
    assert counts.sum() == len(rows) - 6
    assert (experts.flatten()[order][-6:] == E).all()
    products = []
    mm = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *args, **kwargs: products.append(kwargs["out"].numel()) or mm(*args, **kwargs)
    )
    moe.dispatch_ffn(draw(T, D), experts, draw(T, K), *stacked(False, False), "gelu")
    assert sum(products) == (T * K - 6) * (H + D_OUT)


def test_ffn_is_the_dense_block() -> None:
    weights: Any
    x, weights = draw(2, 3, D), [None if w is None else w[0] for w in stacked(True, True)]
    up, gate, down, up_bias, gate_bias, down_bias = weights
    expected = F.linear(F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)
    torch.testing.assert_close(moe.ffn(x, *weights, "silu"), expected)
    torch.testing.assert_close(moe.ffn(x, *weights, "silu", 0.5, False), expected)
    assert not torch.equal(moe.ffn(x, *weights, "silu", 0.5, True), expected)


def test_noise() -> None:
    x = draw(1000, 1).requires_grad_()
    assert torch.equal(moe.jitter_like(x, 0.1, False), torch.ones(1000, 1, dtype=torch.float64))
    assert torch.equal(moe.normal_like(x, False), torch.zeros(1000, 1, dtype=torch.float64))
    torch.manual_seed(0)
    jitter, normal = moe.jitter_like(x, 0.1, True), moe.normal_like(x, True)
    assert 0.9 <= jitter.min() < 0.92 < 1.08 < jitter.max() <= 1.1
    assert abs(normal.mean()) < 0.1
    assert abs(normal.std() - 1) < 0.1
    assert not jitter.requires_grad
    assert not normal.requires_grad
    gumbel, uniform = moe.gumbel_like(x, True), moe.uniform_like(x, True)
    assert not moe.gumbel_like(x, False).any()
    assert not moe.uniform_like(x, False).any()
    assert abs(gumbel.mean() - 0.5772) < 0.15  # Euler's constant; the deviation of the mean is 0.04
    assert 0 <= uniform.min() < 0.02 < 0.98 < uniform.max() < 1


def test_balanced_assignment() -> None:
    scores = draw(7, 3)
    assert torch.equal(moe.balanced_assignment(scores, False), scores.argmax(1))
    chosen = moe.balanced_assignment(scores, True)
    possible = [c for c in itertools.product(range(3), repeat=7) if max(map(c.count, range(3))) <= 3]
    best = max(sum(float(scores[t, e]) for t, e in enumerate(c)) for c in possible)
    assert float(scores.gather(1, chosen[:, None]).sum()) == pytest.approx(best)
    assert torch.bincount(chosen).max() <= 3
    assert moe.balanced_assignment(scores[:2], True).tolist() != []
    assert moe.balanced_assignment(scores[:0], True).shape == (0,)


def test_sinkhorn() -> None:
    scores = draw(12, 4)
    assert torch.equal(moe.sinkhorn(scores, 0.5, 10, False), scores)
    plan = moe.sinkhorn(scores, 0.5, 200, True).exp()
    torch.testing.assert_close(plan.sum(1), torch.full((12,), 1 / 12, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 1 / 4, dtype=torch.float64))
    # The plan is exp(scores / epsilon) with rows and columns scaled: every 2 x 2 determinant of ratios agrees.
    ratio = plan.log() - scores / 0.5
    torch.testing.assert_close(ratio - ratio[:1] - ratio[:, :1] + ratio[0, 0], torch.zeros_like(ratio))


@pytest.mark.parametrize("form", [fused, apart])
def test_autocast(form) -> None:
    arguments: Any = [draw(T, D, seed=10, dtype=torch.float32), routing(), draw(T, K, seed=11, dtype=torch.float32)]
    arguments += [w.requires_grad_() for w in stacked(True, True, torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = form(*arguments, "silu")
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert arguments[3].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("lacking", [False, True])
def test_grouped_mm_equals_the_loop(lacking: bool, gated: bool, dtype: torch.dtype) -> None:
    x, experts = draw(T, D, dtype=dtype), routing(lacking=lacking)
    rows, counts, order = moe.permute(x, experts, E)
    weights = stacked(gated, True, dtype)
    up, down, grad = weights[0], weights[2], draw(T * K, H, dtype=dtype)
    arguments = {
        "linear": (rows, counts, up, weights[3]),
        "outer": (grad, rows, counts),
        "total": (grad, counts),
        "ffn": (x, order // K, counts, *weights, TABLE["silu"]),
    }
    transposed = (draw(T * K, D_OUT, dtype=dtype), counts, down.transpose(1, 2), None)
    assert kernels_grouped.aligned(rows, up, down) == (dtype == torch.bfloat16)
    # Sums in another order and, with bias, one rounding more: relative to the largest value.
    for name, values in [*arguments.items(), ("linear", transposed)]:
        loop, grouped = getattr(kernels, name)(*values), getattr(kernels_grouped, name)(*values)
        assert (loop - grouped).abs().max() <= 4 * torch.finfo(dtype).eps * loop.abs().max(), name


def test_grouped_mm_is_for_cuda_and_aligned_widths() -> None:
    rows = torch.zeros(4, 12, dtype=torch.bfloat16)
    assert not kernels_grouped.aligned(rows)
    assert not kernels_grouped.aligned(rows[:, :0])
    assert kernels_grouped.aligned(torch.zeros(4, 16, dtype=torch.bfloat16), None)
    assert not kernels_grouped.fits(torch.zeros(4, 16, dtype=torch.bfloat16))


def test_names() -> None:
    routed = ["permute", "unpermute", "experts", "dispatch_ffn"]
    grouped = ["grouped_linear", "grouped_outer", "grouped_sum"]
    exchange = ["all_to_all_rows", "all_to_all_even"]
    groups = ["transpose_groups", "local_counts", "pad_groups", "unpad_groups"]
    noise = ["jitter_like", "normal_like", "gumbel_like", "uniform_like"]
    balance = ["balanced_assignment", "sinkhorn"]
    assert sorted(ops.NAMES) == sorted(["ffn", *routed, *grouped, *exchange, *groups, *noise, *balance])


def test_refusals() -> None:
    x, experts, gates = draw(T, D), routing(), draw(T, K)
    up, _, down, up_bias, _, down_bias = weights = stacked(False, True)

    def refused(kind: type[Exception], call, text: str) -> None:
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == text

    high = experts.clone()
    high[3, 1] = 7
    refused(IndexError, lambda: moe.permute(x, high, E), "moeify: expert 7 does not exist, there are 4")
    refused(
        ValueError,
        lambda: moe.balanced_assignment(torch.tensor([[0.0, float("nan")]]), True),
        "moeify::balanced_assignment: the scores are NaN or infinite",
    )
    refused(
        ValueError,
        lambda: moe.sinkhorn(torch.zeros(3), 1.0, 1, True),
        "moeify::sinkhorn: scores are float32 of shape [3], expected floats [T, E]",
    )
    refused(
        IndexError,
        lambda: moe.dispatch_ffn(x, high - 8, gates, *weights, "gelu"),
        "moeify: expert -8 does not exist, there are 4",
    )
    refused(
        ValueError,
        lambda: moe.dispatch_ffn(x, experts, gates[:, :1], *weights, "gelu"),
        "moeify::dispatch_ffn: weights has shape [9, 1], expected [9, 2]",
    )
    refused(
        ValueError,
        lambda: moe.permute(x[:5], experts, E),
        "moeify::permute: x has shape [5, 8] and experts [9, 2], expected [T, D] and [T, K]",
    )
    refused(
        ValueError,
        lambda: moe.dispatch_ffn(x, experts, gates.float(), *weights, "gelu"),
        "moeify::dispatch_ffn: weights is float32 and the rows are float64",
    )
    refused(
        ValueError,
        lambda: moe.dispatch_ffn(x, experts, gates, up, None, down[:, :, :3], up_bias, None, down_bias, "gelu"),
        "moeify::dispatch_ffn: down has shape [4, 24, 3], expected [4, D, 16]",
    )
    rows, counts, order = moe.permute(x, experts, E)
    refused(
        ValueError,
        lambda: moe.experts(rows[:4], counts, *weights, "gelu"),
        "moeify::experts: counts add up to 18 and there are 4 rows",
    )
    refused(
        ValueError,
        lambda: moe.grouped_linear(rows, counts, down, None),
        "moeify::grouped_linear: rows have shape [18, 8] and weight [4, 24, 16], expected [R, I] and [E, O, I]",
    )
    refused(
        ValueError,
        lambda: moe.unpermute(rows, order, gates[:4]),
        "moeify::unpermute: rows have shape [18, 8] and weights [4, 2], expected [T * K, D] and [T, K]",
    )
    refused(
        UnknownName,
        lambda: moe.dispatch_ffn(x, experts, gates, *weights, "gleu"),
        "there is no activation named 'gleu'\n  hint: did you mean 'gelu'?",
    )
