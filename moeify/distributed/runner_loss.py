"""What a run lowers besides the loss of next tokens: the user's own loss, and how far two forward passes are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moeify.errors import UsageError
from moeify.frontend.importing import user_module

# (output of the model, tensors by name, examples that count) -> (sum of losses, how many there are)
Loss = Callable[[Any, Mapping[str, Tensor], int], tuple[Tensor, float]]


@dataclass(frozen=True)
class Consistency:
    """Two forward passes of a batch, for which a model draws its random experts or dropout anew, are to say the same.

    ``divergence(first output, second output, tensors by name)`` gives the sum over the predictions of how far they are
    apart, and how many there are; ``weight`` times its mean goes to the loss. Zuo et al. (THOR), arXiv 2110.04260, for
    experts; Liang et al. (R-Drop), arXiv 2106.14448, for dropout.
    """

    weight: float
    divergence: Callable[[Any, Any, Mapping[str, Tensor]], tuple[Tensor, Tensor]]


def user_loss(text: str) -> Loss:
    """``pkg.mod:function(output, batch)``: a mean over the examples, or a pair (sum, how many). Raises UsageError."""
    path, colon, name = text.partition(":")
    if not colon or not path or not name:
        raise UsageError(f"cannot read the loss {text!r}", hint="write pkg.mod:function")
    try:
        function = getattr(user_module(path), name)
    except Exception as error:  # the user's module may fail in any way
        raise UsageError(
            f"cannot import the loss {text}: {type(error).__name__}: {error}",
            hint="run where it can be imported, for example with PYTHONPATH",
        ) from error

    def loss(output: Any, batch: Mapping[str, Tensor], counted: int) -> tuple[Tensor, float]:
        try:
            value = function(output, batch)
        except Exception as error:
            raise UsageError(f"the loss {text} fails: {type(error).__name__}: {error}") from error
        if isinstance(value, Tensor) and value.numel() == 1:
            return value * counted, float(counted)
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor) and value[0].numel() == 1:
            return value[0] * (1.0 if counted else 0.0), float(value[1]) if counted else 0.0
        raise UsageError(f"the loss {text} returns {type(value).__name__}, not one number or a pair (sum, how many)")

    return loss
