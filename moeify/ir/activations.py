"""The activations that have a name: what each computes, and its gradient in closed form.

The gradient is written out because an operator's implementation runs below autograd and cannot call it. Every function
is made of ATen operators that have CPU and CUDA kernels in float64, float32, float16 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import UnknownName

_aten = torch.ops.aten

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
_QUICK = 1.702


@dataclass(frozen=True)
class Activation:
    """A pointwise function of one tensor.

    ``function(u)`` may return ``u`` itself. ``backward(grad, u)`` is ``grad`` times the derivative at ``u``; at a kink
    it agrees with ATen. ``inplace(u)``, where there is one, overwrites ``u``.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    inplace: Callable[[Tensor], Tensor] | None = None

    def __call__(self, u: Tensor) -> Tensor:
        return self.function(u)

    def overwrite(self, u: Tensor) -> Tensor:
        """The value, in ``u``'s memory where that is possible. The caller gives ``u`` up."""
        return (self.inplace or self.function)(u)


def lookup(name: str) -> Activation:
    """The activation of that name. Raises UnknownName."""
    if name not in TABLE:
        raise UnknownName("activation", name, TABLE)
    return TABLE[name]


def _identity(u: Tensor) -> Tensor:
    return u


def _identity_backward(grad: Tensor, u: Tensor) -> Tensor:
    return grad


def _relu_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.threshold_backward(grad, u, 0)


def _relu2(u: Tensor) -> Tensor:
    return F.relu(u).square()


def _relu2_overwrite(u: Tensor) -> Tensor:
    return u.relu_().square_()


def _relu2_backward(grad: Tensor, u: Tensor) -> Tensor:
    return grad * F.relu(u) * 2


def _gelu_tanh(u: Tensor) -> Tensor:
    return F.gelu(u, approximate="tanh")


def _gelu_tanh_overwrite(u: Tensor) -> Tensor:
    return _aten.gelu_(u, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.gelu_backward(grad, u, approximate="tanh")


def _quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(_QUICK * u)


def _quick_gelu_overwrite(u: Tensor) -> Tensor:
    return u.mul_((u * _QUICK).sigmoid_())


def _quick_gelu_backward(grad: Tensor, u: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK * u)
    return grad * s * (1 + _QUICK * u * (1 - s))


def _sigmoid_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.sigmoid_backward(grad, torch.sigmoid(u))


def _tanh_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.tanh_backward(grad, torch.tanh(u))


def _elu_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.elu_backward(grad, 1.0, 1.0, 1.0, False, u)


def _leaky_relu_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.leaky_relu_backward(grad, u, 0.01, False)


def _softplus_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.softplus_backward(grad, u, 1.0, 20.0)


def _relu6_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.hardtanh_backward(grad, u, 0.0, 6.0)


def _selu_backward(grad: Tensor, u: Tensor) -> Tensor:
    return _aten.elu_backward(grad, _SELU_ALPHA, _SELU_SCALE, 1.0, False, u)


def _softsign_backward(grad: Tensor, u: Tensor) -> Tensor:
    return grad / (1 + u.abs()).square()


TABLE: dict[str, Activation] = {
    entry.name: entry
    for entry in (
        Activation("identity", _identity, _identity_backward, _identity),
        Activation("relu", F.relu, _relu_backward, torch.relu_),
        Activation("relu2", _relu2, _relu2_backward, _relu2_overwrite),
        Activation("gelu", F.gelu, _aten.gelu_backward, _aten.gelu_),
        Activation("gelu_tanh", _gelu_tanh, _gelu_tanh_backward, _gelu_tanh_overwrite),
        Activation("quick_gelu", _quick_gelu, _quick_gelu_backward, _quick_gelu_overwrite),
        Activation("silu", F.silu, _aten.silu_backward, _aten.silu_),
        Activation("sigmoid", torch.sigmoid, _sigmoid_backward, torch.sigmoid_),
        Activation("tanh", torch.tanh, _tanh_backward, torch.tanh_),
        Activation("elu", F.elu, _elu_backward, F.elu_),
        Activation("leaky_relu", F.leaky_relu, _leaky_relu_backward, F.leaky_relu_),
        Activation("mish", F.mish, _aten.mish_backward, _aten.mish_),
        Activation("softplus", F.softplus, _softplus_backward),
        Activation("hardswish", F.hardswish, _aten.hardswish_backward, _aten.hardswish_),
        Activation("hardsigmoid", F.hardsigmoid, _aten.hardsigmoid_backward, _aten.hardsigmoid_),
        Activation("relu6", F.relu6, _relu6_backward, _aten.relu6_),
        Activation("selu", F.selu, _selu_backward, torch.selu_),
        Activation("celu", F.celu, _elu_backward, torch.celu_),
        Activation("softsign", F.softsign, _softsign_backward),
    )
}
