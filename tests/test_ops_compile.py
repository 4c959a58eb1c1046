"""``moe.*`` under the machinery of PyTorch: opcheck, export with a dynamic number of tokens, archives, AOT autograd."""

import io

import pytest
import torch
from torch.export import Dim

import moeify.ir.ops
from tests import test_ops_exchange
from tests.test_ops import D_OUT, D, E, H, K, T, draw, routing, stacked

moe = torch.ops.moeify

ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def leaf(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_()


def cases(tokens: int, gated: bool, biased: bool) -> dict[str, tuple]:
    """Arguments of every operator."""
    x, experts, gates = leaf(draw(tokens, D)), routing(tokens), leaf(draw(tokens, K))
    weights = [leaf(w) for w in stacked(gated, biased)]
    rows, counts, order = (t.detach() for t in moe.permute(x, experts, E))
    hidden = draw(tokens * K, H)
    return {
        "ffn": (x, *[None if w is None else leaf(w[0]) for w in weights], "gelu"),
        "permute": (x, experts, E),
        "unpermute": (leaf(draw(tokens * K, D_OUT)), order, gates),
        "grouped_linear": (leaf(rows), counts, weights[0], weights[3]),
        "grouped_outer": (hidden, rows, counts),
        "grouped_sum": (hidden, counts),
        "experts": (leaf(rows), counts, *weights, "gelu"),
        "dispatch_ffn": (x, experts, gates, *weights, "gelu"),
        "jitter_like": (x, 0.1, False),
        "normal_like": (x, False),
        "gumbel_like": (x, False),
        "uniform_like": (x, False),
        "balanced_assignment": (x, True),
        "sinkhorn": (x, 0.5, 3, True),
    }


@pytest.mark.parametrize("name", sorted(set(moeify.ir.ops.NAMES) - set(test_ops_exchange.cases(2))))
@pytest.mark.parametrize(
    ("tokens", "gated", "biased"), [(T, False, False), (T, True, True), (0, False, True), (1, True, False)]
)
def test_opcheck(name: str, tokens: int, gated: bool, biased: bool) -> None:
    torch.library.opcheck(getattr(moe, name).default, cases(tokens, gated, biased)[name], test_utils=ALL)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("jitter_like", (0.1, True)), ("normal_like", (True,)), ("gumbel_like", (True,)), ("uniform_like", (True,))],
)
def test_opcheck_of_noise(name: str, arguments: tuple) -> None:
    """In training the AOT check compares two draws, so it is left out."""
    op = getattr(moe, name).default
    torch.library.opcheck(op, (leaf(draw(T, D)), *arguments), test_utils=ALL[1:3])
    assert torch.Tag.nondeterministic_seeded in op.tags


class Pieces(torch.nn.Module):
    """Every operator in one forward pass."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        for role, weight in zip(("up", "gate", "down", "up_bias", "gate_bias", "down_bias"), stacked(gated, True)):
            self.register_parameter(role, None if weight is None else torch.nn.Parameter(weight))
        self.route = torch.nn.Linear(D, E, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.up, self.gate, self.down, self.up_bias, self.gate_bias, self.down_bias)
        noisy = x * moe.jitter_like(x, 0.1, False) + moe.normal_like(x, False)
        gates, experts = self.route(noisy).softmax(-1).topk(K)
        rows, counts, order = moe.permute(x, experts, E)
        hidden = moe.grouped_linear(rows, counts, self.up, self.up_bias).relu()
        y = moe.unpermute(moe.grouped_linear(hidden, counts, self.down, self.down_bias), order, gates)
        y = y + moe.unpermute(moe.experts(rows, counts, *weights, "silu"), order, gates)
        return y + moe.dispatch_ffn(x, experts, gates, *weights, "silu")


@pytest.mark.parametrize("gated", [False, True])
def test_export_with_any_number_of_tokens(gated: bool) -> None:
    model = Pieces(gated)
    program = torch.export.export(model, (draw(T, D),), dynamic_shapes=((Dim.AUTO, Dim.STATIC),), strict=False)
    archive = io.BytesIO()
    torch.export.save(program, archive)
    archive.seek(0)
    loaded = torch.export.load(archive).module()
    for tokens in (2, T, 31):
        x = draw(tokens, D, seed=tokens)
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    text = str(program.graph)
    assert all(f"moeify.{name}.default" in text for name in ("permute", "experts", "dispatch_ffn", "unpermute"))


@pytest.mark.parametrize("gated", [False, True])
def test_compile_with_gradients(gated: bool) -> None:
    model = Pieces(gated)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (T, 31):
        x = draw(tokens, D, seed=tokens).requires_grad_()
        leaves = [x, *model.parameters()]
        want = torch.autograd.grad(model(x).square().sum(), leaves)
        got = torch.autograd.grad(compiled(x).square().sum(), leaves)
        for one, other in zip(got, want):
            torch.testing.assert_close(one, other)
