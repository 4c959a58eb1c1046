"""Which parameters of a converted model are trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from moeify.errors import UsageError

# What a block has below its name.
_PARTS = {
    "experts": ("experts.", "shared.", "output_bias"),
    "routers": ("router.", "shared_gate."),
    "ffn": ("experts.", "shared.", "output_bias", "router.", "shared_gate."),
}


def train_only(model: nn.Module, blocks: Iterable[str], only: str) -> tuple[int, int]:
    """Let the parameters of the blocks, by their anchors, require gradients, and no others; the numbers of elements
    that are trained, and in all. ``experts`` are the routed and the shared ones, ``ffn`` is those and the routers,
    ``all`` leaves the model as it is.

    Raises UsageError where nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    if only != "all":
        prefixes = tuple(f"{block}.{part}" if block else part for block in blocks for part in _PARTS[only])
        for name, parameter in parameters.items():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(prefixes))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters.values()]
    trained = sum(size for size, on in sizes if on)
    if not trained:
        raise UsageError(f"with --only {only} there is no parameter to train", hint="choose --only ffn, or all")
    return trained, sum(size for size, _ in sizes)
