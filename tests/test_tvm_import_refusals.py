"""What has no conversion is said all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moeify.errors import Refused
from tests.tvm_run import imported


class Far(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Far(), Far()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return torch.linalg.det(y[None, :3, :3]) + y.sum()


def test_every_operator_with_the_modules_that_call_it():
    with pytest.raises(Refused) as refused:
        imported(Model(), torch.randn(4, 3))
    assert str(refused.value) == (
        "2 operators have no conversion to TVM:\n"
        "  aten.cdist.default (2): first, second\n"
        "  aten.linalg_det.default (1): (root)\n"
        "  hint: export it to ONNX Runtime instead: moeify export --to onnxruntime"
    )


def test_an_input_that_is_overwritten():
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[:, 0] = 1.0
            return x + 1

    with pytest.raises(Refused, match=r"aten\.(copy_|fill_)"):
        imported(Overwrites(), torch.randn(4, 3))
