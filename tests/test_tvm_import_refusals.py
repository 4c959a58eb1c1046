"""What has no conversion is said all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moeify.errors import Refused
from tests.tvm_run import imported, running


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


def test_a_scatter_to_a_part_of_the_other_axes():
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.scatter(1, torch.zeros(2, 1, dtype=torch.int64), x[:2, :1])

    with pytest.raises(Refused, match=r"aten\.scatter\.src"):
        imported(Part(), torch.randn(4, 3))


def test_a_wrong_place_is_not_written_to():
    """torch refuses it; a kernel can only leave memory alone that is not its own."""

    class Outside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(x.shape[0], 3).scatter(1, x.long(), torch.ones_like(x))

    run = running(imported(Outside(), torch.zeros(4, 2)))
    (result,) = run(torch.tensor([[1.0, 3.0], [-1.0, 0.0], [2.0**40, 2.0], [-(2.0**40), 1.0]]))
    expected = torch.zeros(4, 3)
    expected[[0, 1, 2, 3], [1, 0, 2, 1]] = 1
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
