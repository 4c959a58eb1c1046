"""Operators of torch in TVM: each against torch, at the size that was exported, at another one and at one row."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tvm_run import imported, running

CLOSE = 3e-6  # the sums of eight numbers in another order, and the runtime's exp, tanh and erf
Cases = dict[str, Callable[["Model", Tensor], object]]


class Model(nn.Module):
    """All cases of one kind in one graph: compiled once."""

    def __init__(self, cases: Cases) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cases = cases
        self.w, self.b, self.v = (nn.Parameter(torch.randn(s)) for s in ((6, 8), (6,), (8,)))
        self.kernel = nn.Parameter(torch.randn(4, 2, 3))
        self.register_buffer("mean", torch.randn(2))
        self.register_buffer("var", torch.rand(2) + 0.5)

    def forward(self, x: Tensor) -> list[object]:
        return [case(self, x) for case in self.cases.values()]


ARITHMETIC: Cases = {
    "add with a factor": lambda m, x: torch.add(x, m.v, alpha=0.5),
    "reversed": lambda m, x: 2.0 - x,
    "integers over a number": lambda m, x: (x * 4).long() / 3,
    "rounded down": lambda m, x: torch.div((x * 4).long(), 3, rounding_mode="floor"),
    "remainder of a negative number": lambda m, x: torch.remainder((x * 4).long(), 3),
    "a boolean and a number": lambda m, x: (x > 0) * 3 + 1,
    "powers": lambda m, x: [x**2, x**3, x.abs() ** 0.5, (x.abs() + 1) ** -0.5, 2**x, x.abs() ** 1.7],
    "one side limited": lambda m, x: [x.clamp(max=0.3), x.clamp(min=-0.3), x.clamp(-0.1, 0.1)],
    "where": lambda m, x: torch.where(x > 0, x, -math.inf),
    "masked": lambda m, x: x.masked_fill(x > 0, -1e9),
    "logic": lambda m, x: [(x > 0) & (x < 1), (x > 0) | (x < -1), ~(x > 0), (x > 0) ^ (x > 1)],
    "booleans compared": lambda m, x: [(x > 0) == (x > 1), (x > 0) != (x > 1), (x > 0) < (x > 1)],
    "halves": lambda m, x: torch.round((x * 4).round() + 0.5),
    "small logarithms": lambda m, x: [torch.log1p(x * 1e-6), torch.expm1(x * 1e-6)],
    "decomposed": lambda m, x: [torch.addcmul(x, x, m.v), torch.lerp(x, m.v, 0.3), torch.diff(x, dim=1)],
}
ACTIVATIONS: Cases = {
    "named": lambda m, x: [F.relu(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), x.sigmoid(), x.tanh()],
    "of a slope": lambda m, x: [F.leaky_relu(x, 0.25), F.elu(x, 0.7), F.celu(x, 1.3), F.selu(x)],
    "soft": lambda m, x: [F.softplus(x), F.softplus(x * 30, beta=2), F.mish(x), F.softsign(x), F.logsigmoid(x)],
    "hard": lambda m, x: [F.hardswish(x), F.hardsigmoid(x), F.hardtanh(x, -0.5, 0.5), F.relu6(x * 5)],
    "gated": lambda m, x: F.glu(x),
    "learned": lambda m, x: F.prelu(x, m.v),
}
MOVEMENT: Cases = {
    "views": lambda m, x: [x.view(-1, 2, 4).transpose(1, 2), x.reshape(-1), x.unsqueeze(1), x.flatten()],
    "written outside": lambda m, x: torch.slice_scatter(x, x[:, :8] * 2, 1, -10),
    "slices": lambda m, x: [x[1:], x[:, -3:], x[:, ::2], x[:, 2], x[-1], x[:, 1:100]],
    "split": lambda m, x: [*x.split(3, 1), *x.chunk(3, 1), *x.unbind(1)],
    "joined": lambda m, x: [torch.cat([x, x[:1]]), torch.stack([x, x], 1), torch.cat([x, m.w])],
    "repeated": lambda m, x: [x.repeat(2, 1, 1), x.repeat_interleave(2, 1), x.expand(3, -1, -1)],
    "turned": lambda m, x: [x.flip(1), torch.roll(x, 3, 1), torch.roll(x, -1, 0)],
    "padded": lambda m, x: [F.pad(x, (1, 2), value=3.0), F.pad(x, (0, 0, 1, 0)), F.pad(x, (-1, 2))],
    "windows": lambda m, x: x.unfold(1, 4, 2),
    "overwritten": lambda m, x: _overwritten(x),
}
CREATION: Cases = {
    "ranges": lambda m, x: [
        torch.arange(x.shape[0]),
        torch.arange(2, x.shape[0] + 5, 2),
        torch.arange(0, 9, 2.5),
        torch.arange(x.shape[0], dtype=torch.float32),
    ],
    "filled": lambda m, x: [torch.full((x.shape[0], 2), 7), torch.zeros_like(x), x.new_ones(x.shape[0])],
    "triangles": lambda m, x: [x.tril(), x.triu(1), torch.ones(x.shape[0], x.shape[0]).tril()],
    "a size as a number": lambda m, x: x * x.shape[0],
}
INDEXING: Cases = {
    "embedding": lambda m, x: F.embedding(_places(x), m.w),
    "gather": lambda m, x: x.gather(1, _places(x)),
    "index": lambda m, x: [x[:, torch.tensor([3, -1])], x[_rows(x)], m.w[_places(x)]],
    "two that broadcast": lambda m, x: x[_rows(x)[:, None], torch.tensor([[1, 2, -3]])],
    "two apart": lambda m, x: m.kernel[_places(x)[:, 0] % 4, :, _places(x)[:, 1] % 3],
    "index_select": lambda m, x: torch.index_select(x, 1, torch.tensor([5, 0])),
    "scatter": lambda m, x: [
        x.scatter(1, x.argsort(1), x * 2),
        x.scatter(0, x.argsort(0), x),
        x.scatter(1, _places(x)[:, :1], 7.0),
        torch.zeros(x.shape[0], 4, 2).scatter(
            1, _places(x).view(-1, 4, 2) % 1 + 2, x.view(-1, 4, 2)[:, :1].repeat(1, 4, 1)
        ),
    ],
}
REDUCTIONS: Cases = {
    "sums": lambda m, x: [x.sum(), x.sum(1), x.mean(1, keepdim=True), x.mean(0), (x > 0).sum(1)],
    "extremes": lambda m, x: [x.amax(1), x.max(), *x.max(1), *x.min(1), x.argmax(1), x.argmax()],
    "spread": lambda m, x: [x.var(1), x.std(1, correction=0), x.norm(dim=1), F.normalize(x)],
    "any and all": lambda m, x: [(x > 0).any(1), (x > -9).all()],
    "softmax": lambda m, x: [x.softmax(1), x.softmax(0), x.log_softmax(1), x.logsumexp(1)],
    "running": lambda m, x: [x.cumsum(1), (x > 0).cumsum(0)],
    "sorted": lambda m, x: [*x.sort(dim=1, descending=True, stable=True), *x.topk(3), x.argsort(1)],
    "the first of equal ones": lambda m, x: list(x.round().sort(dim=1, descending=True, stable=True)),
    "places in sorted rows": lambda m, x: [
        torch.searchsorted(x.sort(1)[0], x),
        torch.searchsorted(x.round().sort(1)[0], x.round()),
        torch.searchsorted(x.round().sort(1)[0], x.round(), right=True, out_int32=True),
        torch.searchsorted(m.v.sort()[0], x),
        torch.searchsorted(m.v.sort()[0], 0.3),
    ],
    "no number is last": lambda m, x: torch.searchsorted(m.v.sort()[0], torch.where(x > 0, math.nan, x)),
}
MATRICES: Cases = {
    "linear": lambda m, x: [F.linear(x, m.w, m.b), F.linear(x, m.w), F.gelu(F.linear(x, m.w, m.b))],
    "of fixed matrices": lambda m, x: [x @ m.w.T, torch.addmm(m.b, x, m.w.t()), torch.mm(x, m.w.t())],
    "of two computed ones": lambda m, x: [x @ x.T, torch.bmm(x[None], x.T[None]), torch.einsum("ij,kj->ik", x, x)],
    "scaled": lambda m, x: torch.baddbmm(x[:1, :1, None], x[None], x.T[None], beta=0.5, alpha=2.0),
    "convolutions": lambda m, x: [_conv(m, x), _conv(m, x, padding=1), _conv(m, x, stride=3), _conv(m, x, dilation=2)],
    "of one element": lambda m, x: F.conv1d(x.view(-1, 2, 4), m.kernel[:, :, :1]),
    "transposed": lambda m, x: F.conv_transpose1d(x.view(-1, 4, 2), m.kernel, stride=2, output_padding=1),
    "norms": lambda m, x: [F.layer_norm(x, [8], m.v, m.v), F.layer_norm(x, [8]), F.rms_norm(x, [8], m.v)],
    "norms of channels": lambda m, x: [
        F.batch_norm(x.view(-1, 2, 4), m.mean, m.var),
        F.group_norm(x.view(-1, 4, 2), 2),
    ],
    "pooled": lambda m, x: [F.adaptive_avg_pool1d(x.view(-1, 2, 4), 1), F.avg_pool2d(x.view(-1, 1, 2, 4), 2)],
}
KINDS = {
    "arithmetic": ARITHMETIC,
    "activations": ACTIVATIONS,
    "movement": MOVEMENT,
    "creation": CREATION,
    "indexing": INDEXING,
    "reductions": REDUCTIONS,
    "matrices": MATRICES,
}


def _places(x: Tensor) -> Tensor:
    return (x.abs() * 10).long() % 6


def _rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] - 1, -1, -1)


def _conv(m: Model, x: Tensor, **options: int) -> Tensor:
    return F.conv1d(x.view(-1, 2, 4).repeat(1, 1, 2), m.kernel, m.v[:4], **options)


def _overwritten(x: Tensor) -> list[Tensor]:
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    y[:, 2:4] = x[:, :2] * 2
    z = y + 1
    z.add_(x)
    return [y, z, z[:, 1:3]]


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_torch(kind):
    model = Model(KINDS[kind]).eval()
    draw = torch.Generator().manual_seed(1)
    run = running(imported(model, torch.randn(5, 8, generator=draw)))
    for rows in (5, 3, 1):
        if rows == 1 and kind == "reductions":
            rows = 2  # the deviation of one row is no number, and warns
        x = torch.randn(rows, 8, generator=draw)
        expected = torch.utils._pytree.tree_leaves(model(x))
        for result, value in zip(run(x), expected, strict=True):
            torch.testing.assert_close(result, value, rtol=CLOSE, atol=CLOSE)
