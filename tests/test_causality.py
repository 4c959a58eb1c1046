"""Which programs are causal, by what their graphs do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.ir.causality import causal_node
from tests import programs

N = 6


class Attention(nn.Module):
    """Attention over [B, S, 8] whose mask is of one kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("triangle", torch.ones(N, N).tril().view(1, N, N))
        self.register_buffer("additive", torch.full((N, N), -torch.inf).triu(1))
        self.register_buffer("full", torch.ones(N, N))
        self.square = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        if self.kind in ("flag", "none"):
            return F.scaled_dot_product_attention(x, x, x, is_causal=self.kind == "flag")
        scores = x @ x.transpose(1, 2)
        place = torch.arange(size, device=x.device)
        if self.kind == "compared":
            scores = scores.masked_fill(place[None, :] > place[:, None], -torch.inf)
        elif self.kind == "triu":
            scores = scores + torch.full((size, size), -torch.inf).triu(1)
        elif self.kind == "stored":
            scores = scores.masked_fill(self.triangle == 0, -torch.inf)
        elif self.kind == "stored additive":
            scores = scores + self.additive
        elif self.kind == "stored ones":
            scores = scores * self.full
        elif self.kind == "distances":
            scores = scores - (place[None, :] - place[:, None]).abs()
        elif self.kind == "trained square":
            scores = self.square(scores)
        elif self.kind == "compared values":
            scores = scores * (x.sum(2)[:, :, None] > x.sum(2)[:, None, :])
        return scores.softmax(-1) @ x


class Recurrent(nn.Module):
    def __init__(self, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional, self.ways = bidirectional, 2 if bidirectional else 1
        self.weights = nn.ParameterList(torch.randn(8, 8) for _ in range(2 * self.ways))

    def forward(self, x: Tensor) -> Tensor:
        start = x.new_zeros(self.ways, x.shape[0], 8)
        return torch.rnn_tanh(x, start, list(self.weights), False, 1, 0.0, False, self.bidirectional, True)[0]


@pytest.mark.parametrize("kind", ["flag", "compared", "triu", "stored", "stored additive"])
def test_causal(kind):
    assert causal_node(programs.capture(Attention(kind), torch.randn(2, N, 8), dynamic=(0,))) is not None


@pytest.mark.parametrize("kind", ["none", "stored ones", "distances", "trained square", "compared values"])
def test_not_causal(kind):
    assert causal_node(programs.capture(Attention(kind), torch.randn(2, N, 8), dynamic=(0,))) is None


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers(bidirectional):
    made = programs.capture(Recurrent(bidirectional), torch.randn(2, N, 8), dynamic=(0,))
    assert (causal_node(made) is None) == bidirectional
