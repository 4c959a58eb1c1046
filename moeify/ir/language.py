"""Which input of a program takes the tokens of a text, and which output gives scores for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify.ir.program import Program, flat
from moeify.ir.token_ids import embedded_ids


@dataclass(frozen=True)
class TokenInput:
    """The input [batch, sequence] of token ids, and how many there are."""

    name: str
    vocabulary: int


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


def token_input_of(program: Program) -> TokenInput | None:
    """The input that the largest embedding reads; None where there is none of the form [batch, sequence]."""
    found = next((ids for ids in embedded_ids(program.graph) if ids.is_input), None)
    if found is None or found.node.meta["val"].dim() != 2:
        return None
    holders = program.graph.find_nodes(op="placeholder")
    return TokenInput(program.inputs[holders.index(found.placeholder)].name, found.vocabulary)


def language_of(program: Program) -> Language | None:
    """None for a program that has no output of the form [batch, sequence, vocabulary]."""
    found = token_input_of(program)
    if found is None:
        return None
    masks = [spec.name for spec in program.inputs if "mask" in spec.name and len(spec.shape) == 2]
    outputs = torch.utils._pytree.tree_leaves(program.graph.output_node().args[0])
    values = [node.meta.get("val") for node in outputs if isinstance(node, fx.Node)]
    for position, value in enumerate(value for value in values if isinstance(value, Tensor)):
        if value.dim() == 3 and value.is_floating_point() and value.shape[2] == found.vocabulary:
            return Language(found.name, masks[0] if masks else None, position, found.vocabulary)
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
