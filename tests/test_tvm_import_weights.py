"""What becomes a parameter of the compiled function, and by which name the target's kernels are given it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.backends.tvm.families import Families
from tests.tvm_run import imported, running


class Tied(nn.Module):
    """A weight read twice, a transposed one, what is computed of one, and a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(8, 4))
        self.gain = nn.Parameter(torch.randn(8))
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("strided", torch.randn(8, 8)[:, ::2])

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) * (1 + self.gain)
        return self.head(x), x @ self.turned, (x @ self.strided) * self.scale


def test_names_and_values():
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    one = imported(Tied(), ids)
    names = [weight.name for weight in one.weights]
    assert names == ["embed.weight", "constant.add", "turned.T", "strided.T"]  # tied once, the number in the code
    model = Tied().eval()
    for result, value in zip(running(one)(ids), model(ids), strict=True):
        torch.testing.assert_close(result, value)


def test_kernels_of_the_target_are_asked_first():
    asked = []

    def linear(emitter: Any, x: Any, weight: str, bias: str | None, activation: str = "identity") -> None:
        asked.append((weight, bias, activation))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(F.gelu(self.up(x)), 0.5, self.training))

    imported(Model(), torch.randn(3, 8), families=Families({"linear": linear}))
    assert asked == [
        ("up.weight", "up.bias", "gelu"),
        ("up.weight", "up.bias", "identity"),
        ("down.weight", None, "identity"),
    ]
