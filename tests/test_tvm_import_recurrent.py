"""LSTM and GRU in TVM: layers, both directions, either layout, with and without biases and states, against torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.backends.tvm.importing import import_graph
from moeify.backends.tvm.machine import machine
from moeify.errors import Refused
from tests.tvm_run import NOTHING, exported, imported, running

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export, of the weights it flattens

CLOSE = 3e-6  # the sums of eight numbers in another order, and the runtime's exp and tanh, over five steps


class Every(nn.Module):
    """All variants of one kind in one graph: compiled once."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.deep = kind(8, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.plain = kind(8, 5, bias=False)
        self.begun = kind(8, 5, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        state = x[None, :, 0, :5]
        states = (state, state.tanh()) if isinstance(self.begun, nn.LSTM) else state
        return self.deep(x), self.plain(x.transpose(0, 1)), self.begun(x, states)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_agrees_with_torch(kind: Any) -> None:
    model = Every(kind).eval()
    draw = torch.Generator().manual_seed(1)
    run = running(imported(model, torch.randn(4, 5, 8, generator=draw)))
    for rows in (4, 1):
        x = torch.randn(rows, 5, 8, generator=draw)
        expected = torch.utils._pytree.tree_leaves(model(x))
        for result, value in zip(run(x), expected, strict=True):
            torch.testing.assert_close(result, value, rtol=CLOSE, atol=CLOSE)


class Running(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Placed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.searchsorted(x, x)


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.scatter(1, x.argmax(1, keepdim=True), x[:, :1])


CPU_ONLY: Sequence[tuple[nn.Module, tuple[int, ...], str]] = (
    (nn.LSTM(8, 5, batch_first=True), (2, 3, 8), "lstm.input"),
    (nn.GRU(8, 5, batch_first=True), (2, 3, 8), "gru.input"),
    (Running(), (2, 3), "cumsum.default"),
    (Placed(), (2, 3), "searchsorted.Tensor"),
    (Written(), (2, 3), "scatter.src"),
)


@pytest.mark.parametrize(("model", "shape", "name"), CPU_ONLY, ids=[name for *_, name in CPU_ONLY])
def test_what_only_a_cpu_runs_is_refused_for_cuda(model: nn.Module, shape: tuple[int, ...], name: str) -> None:
    graph, inputs = exported(model, torch.randn(shape))
    with pytest.raises(Refused) as refused:
        import_graph(graph, inputs, machine("cuda", "sm_90"), NOTHING)
    assert refused.value.what.startswith("1 operator has no conversion to TVM on CUDA:\n  aten." + name)
