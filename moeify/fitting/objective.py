"""The loss whose gradients say which hidden units matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.errors import Refused
from moeify.ir.language import is_causal, language_of
from moeify.ir.program import Program, flat

Objective = Callable[[Any, Sequence[Tensor]], Tensor]  # (output, inputs) -> a sum over the examples


def objective_of(program: Program, module: nn.Module) -> tuple[str, Objective]:
    """What the outputs of a program are, for people, and its loss.

    Scores of next tokens: their cross entropy. Other scores (of the words at each position, or an only output of two
    dimensions, [batch, classes]): the cross entropy of the model's own most probable class. Anything else: half the
    sum of squares, which says little of a model that ends in a normalisation, as that hardly changes the length of
    its output. All are sums, so that a row's gradient does not depend on the size of the batch.
    """
    language = language_of(program)
    if language is not None and is_causal(module, program, language):
        names = [spec.name for spec in program.inputs]

        def of_next_tokens(output: Any, inputs: Sequence[Tensor]) -> Tensor:
            return language.loss(output, dict(zip(names, inputs)), 1)[0]

        return "cross entropy of next tokens", of_next_tokens

    def of_own_class(output: Any, inputs: Sequence[Tensor]) -> Tensor:
        scores = _floating(output)[0] if language is None else flat(output)[language.output]
        logits = scores.flatten(0, -2).float()
        return F.cross_entropy(logits, logits.argmax(-1), reduction="sum")

    def of_squares(output: Any, inputs: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.float().square().sum() for value in _floating(output)]).sum() / 2

    outputs = [node.meta.get("val") for node in program.graph.output_node().all_input_nodes]
    values = [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()]
    if not values:
        raise Refused("the model has no output of floating-point numbers, so there is no gradient to take")
    classes = len(values) == 1 and values[0].dim() == 2 and values[0].shape[1] > 1
    if language is not None or classes:
        return "cross entropy of the model's own class", of_own_class
    return "half the squared output", of_squares


def _floating(output: Any) -> list[Tensor]:
    return [value for value in flat(output) if value.is_floating_point()]
