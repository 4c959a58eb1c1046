"""What a run measures: the loss of next tokens where a program is a causal language model, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify.errors import UsageError
from moeify.frontend.importing import user_module
from moeify.ir.program import Program, flat
from moeify.ir.token_ids import embedded_ids

# (output of the model, tensors by name, examples that count) -> (sum of losses, how many there are)
Loss = Callable[[Any, Mapping[str, Tensor], int], tuple[Tensor, float]]


@dataclass(frozen=True)
class Language:
    """A program that reads token ids and gives a score for every word of its vocabulary at every position.

    ``output`` is the position of the scores among the program's outputs.
    """

    ids: str
    mask: str | None
    output: int
    vocabulary: int

    def loss(self, output: Any, batch: Mapping[str, Tensor], counted: int) -> tuple[Tensor, float]:
        """Cross entropy of each token given those before it, where the mask, if there is one, is on."""
        logits, ids = flat(output)[self.output], batch[self.ids]
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        on = torch.ones_like(ids[:, 1:]) if self.mask is None else batch[self.mask][:, 1:]
        weights = (on != 0).to(losses.dtype).flatten()
        scale = 1.0 if counted else 0.0
        return (losses * weights).sum() * scale, float(weights.sum()) * scale


def language_of(program: Program) -> Language | None:
    """None for a program that has no output of the form [batch, sequence, vocabulary]."""
    found = next((ids for ids in embedded_ids(program.graph) if ids.is_input), None)
    if found is None or found.node.meta["val"].dim() != 2:
        return None
    holders = program.graph.find_nodes(op="placeholder")
    ids = program.inputs[holders.index(_source(found.node))].name
    masks = [spec.name for spec in program.inputs if "mask" in spec.name and len(spec.shape) == 2]
    outputs = torch.utils._pytree.tree_leaves(program.graph.output_node().args[0])
    values = [node.meta.get("val") for node in outputs if isinstance(node, fx.Node)]
    for position, value in enumerate(value for value in values if isinstance(value, Tensor)):
        if value.dim() == 3 and value.is_floating_point() and value.shape[2] == found.vocabulary:
            return Language(ids, masks[0] if masks else None, position, found.vocabulary)
    return None


def is_causal(module: nn.Module, program: Program, language: Language) -> bool:
    """Whether the scores of a position stay when a later token changes: a masked language model has scores too.

    Runs the module twice, on every rank.
    """
    example = [tensor.clone() for tensor in program.example]
    names = [spec.name for spec in program.inputs]
    changed = [tensor.clone() for tensor in example]
    ids = changed[names.index(language.ids)]
    if ids.shape[1] < 2:
        return False
    ids[-1, -1] = (ids[-1, -1] + 1) % language.vocabulary
    if language.mask is not None:  # all tokens on, so that the changed one could be seen
        for inputs in (example, changed):
            inputs[names.index(language.mask)].fill_(1)
    with torch.no_grad():
        before, after = (flat(module(*inputs))[language.output][-1, :-1] for inputs in (example, changed))
    return float((after - before).abs().max()) <= 1e-4 * float(before.abs().max())  # rounding, in any float type of use


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


def _source(node: fx.Node) -> fx.Node:
    while node.op != "placeholder":
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
    return node
