"""Every named activation: its gradient in closed form against autograd, its dtypes, its in-place form."""

from typing import Any

import pytest
import torch

from moeify.errors import UnknownName
from moeify.ir.activations import TABLE, lookup

REQUIRED = {
    "identity",
    "relu",
    "relu2",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "sigmoid",
    "tanh",
    "elu",
    "leaky_relu",
    "mish",
    "softplus",
    "hardswish",
    "hardsigmoid",
    "relu6",
    "selu",
    "celu",
    "softsign",
}


def test_names() -> None:
    assert set(TABLE) >= REQUIRED
    assert all(TABLE[name].name == name for name in TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_backward_is_the_derivative(name: str) -> None:
    u = torch.linspace(-7.3, 25.1, 4001, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(TABLE[name](u), u, grad)
    with torch.no_grad():
        torch.testing.assert_close(TABLE[name].backward(grad, u), expected)


@pytest.mark.parametrize("name", TABLE)
def test_at_zero_backward_agrees_with_aten(name: str) -> None:
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(TABLE[name](u).sum(), u)
    torch.testing.assert_close(TABLE[name].backward(torch.ones_like(expected), u.detach()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TABLE)
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    u = torch.linspace(-4, 4, 65).to(dtype)
    value, slope = TABLE[name](u), TABLE[name].backward(torch.ones_like(u), u)
    assert value.dtype == slope.dtype == dtype
    wide = u.double()
    # Several roundings in the type itself, relative to values of up to 16 (relu2).
    close: dict[str, Any] = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(value.double(), TABLE[name](wide), **close)
    torch.testing.assert_close(slope.double(), TABLE[name].backward(torch.ones_like(wide), wide), **close)


@pytest.mark.parametrize("name", TABLE)
def test_overwrite(name: str) -> None:
    u = torch.linspace(-4, 4, 65, dtype=torch.float64)
    expected = TABLE[name](u.clone())
    torch.testing.assert_close(TABLE[name].overwrite(u), expected, rtol=0, atol=1e-15)


def test_unknown_name() -> None:
    with pytest.raises(UnknownName) as caught:
        lookup("gleu")
    assert str(caught.value) == "there is no activation named 'gleu'\n  hint: did you mean 'gelu'?"
