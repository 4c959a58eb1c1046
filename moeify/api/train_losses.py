"""What a training run lowers: the task's loss, the distance to a teacher, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from moeify.api.output_kinds import PREDICTIONS, OutputKind, output_kinds
from moeify.api.train_teacher import Teacher
from moeify.data.tensors import LABELS
from moeify.distributed.runner_data import Examples
from moeify.distributed.runner_loss import Consistency, Loss
from moeify.errors import BadInputSpec, BadOption
from moeify.ir.language import language_of
from moeify.ir.program import Program, flat
from moeify.training.consistency import divergences

IGNORED = -100  # a label of what does not count, as in torch


def has_labels(examples: Examples) -> bool:
    """Whether the data say, beside the inputs, what class an example or a token is of."""
    labels = examples.tensors.get(LABELS)
    return labels is not None and not labels.is_floating_point() and LABELS not in examples.inputs


def kinds_of(program: Program, examples: Examples, by_labels: bool) -> list[OutputKind]:
    """Of the model's outputs; labels say that an output [batch, classes] is scores. Raises BadOption where they are
    there and no output is that."""
    kinds = output_kinds(program, classes=False)
    if not by_labels or not has_labels(examples) or any(one.kind in PREDICTIONS for one in kinds):
        return kinds
    return output_kinds(program, classes=True)


def classes_of(kinds: Sequence[OutputKind], examples: Examples) -> int | None:
    """The position of the output that the labels of the data are of; None where there are no labels or no scores."""
    if not has_labels(examples):
        return None
    return next((position for position, one in enumerate(kinds) if one.kind == "classes"), None)


def check_classes(program: Program, kinds: Sequence[OutputKind], examples: Examples, source: str) -> list[str]:
    """Notes on the classes of a folder of images and the scores that are held against them. Raises BadInputSpec where
    there are fewer scores than classes."""
    position = classes_of(kinds, examples)
    if position is None or not examples.classes:
        return []
    leaves = tree_leaves(program.graph.output_node().args[0])
    values = [leaf.meta["val"] for leaf in leaves if isinstance(leaf, fx.Node)]
    scores = [value for value in values if isinstance(value, Tensor)][position].shape[-1]
    if len(examples.classes) > scores:
        raise BadInputSpec(
            f"{source} has {len(examples.classes)} classes and the model scores for {scores}: none for "
            f"{examples.classes[scores]!r}, which is number {scores} from 0",
            hint="the sub-folders are the classes, in the order of their names: leave some out",
        )
    if len(examples.classes) < scores:
        return [f"{source} has {len(examples.classes)} classes: they are the first of the model's {scores} scores"]
    return []


def task_loss(program: Program, kinds: Sequence[OutputKind], examples: Examples) -> Loss | None:
    """Of next tokens for a causal language model, else of the labels in the data, else None."""
    if any(one.kind == "next tokens" for one in kinds):
        language = language_of(program)
        assert language is not None
        return language.loss
    position = classes_of(kinds, examples)
    return None if position is None else _labels_loss(position)


def _labels_loss(position: int) -> Loss:
    def loss(output: Any, batch: Mapping[str, Tensor], counted: int) -> tuple[Tensor, float]:
        scores, labels = scores_and_labels(output, batch, position)
        value = F.cross_entropy(scores.float(), labels, ignore_index=IGNORED, reduction="sum")
        scale = 1.0 if counted else 0.0
        return value * scale, float((labels != IGNORED).sum()) * scale

    return loss


def scores_and_labels(output: Any, batch: Mapping[str, Tensor], position: int) -> tuple[Tensor, Tensor]:
    """Scores [N, C] and labels [N]. Raises BadInputSpec for labels that do not fit."""
    scores, labels = flat(output)[position], batch[LABELS]
    classes = scores.shape[-1]
    if labels.shape != scores.shape[:-1]:
        raise BadInputSpec(f"the labels are {list(labels.shape)} and the model's scores {list(scores.shape)}")
    if bool(((labels != IGNORED) & ((labels < 0) | (labels >= classes))).any()):
        raise BadInputSpec(f"a label is not one of 0 to {classes - 1}", hint=f"{IGNORED} is what does not count")
    return scores.flatten(0, -2), labels.flatten().long()


def distance_to(
    teacher: Teacher, kinds: Sequence[OutputKind], distance: str | None, temperature: float
) -> tuple[Loss, str]:
    """The mean distance of a batch's rows to the teacher's, added up over the outputs that are compared: those that
    predict something, or where there is none, the others; and its name.

    ``kl`` is T^2 KL(teacher || model) in nats of softmax(scores / T) (Hinton et al. 2015, 1503.02531); ``mse`` the mean
    squared error over the teacher's mean square; ``cosine`` 1 - cosine. Without a distance it is ``kl`` of predictions
    and ``mse`` of the rest. Raises BadOption for ``kl`` of a model that predicts nothing.
    """
    predicts = [position for position, one in enumerate(kinds) if one.kind in PREDICTIONS]
    if distance == "kl" and not predicts:
        raise BadOption(
            "the outputs of the model predict nothing, so there is no KL", hint="choose --distill mse or cosine"
        )
    name = distance or ("kl" if predicts else "mse")

    def loss(output: Any, batch: Mapping[str, Tensor], counted: int) -> tuple[Tensor, float]:
        values, wanted = flat(output), teacher.outputs(batch, flat(output))
        total = torch.zeros((), device=values[0].device)
        for position in predicts or range(len(kinds)):
            value, goal = (
                _rows(x[position], kinds[position], batch, teacher.student).float() for x in (values, wanted)
            )
            total = total + _DISTANCES[name](value, goal, temperature)
        return total * counted, float(counted)

    return loss, name


def mixed(first: Loss, second: Loss, weight: float) -> Loss:
    """``weight`` of the first loss's mean and the rest of the second's, for each example."""

    def loss(output: Any, batch: Mapping[str, Tensor], counted: int) -> tuple[Tensor, float]:
        (a, terms_a), (b, terms_b) = (one(output, batch, counted) for one in (first, second))
        mean = weight * a / max(terms_a, 1.0) + (1 - weight) * b / max(terms_b, 1.0)
        return mean * counted, float(counted)

    return loss


def consistency_of(kinds: Sequence[OutputKind], inputs: Sequence[str], weight: float) -> Consistency:
    """The symmetric KL divergence of the predictions of two forward passes, of all outputs that predict something and
    without rows of padding; ``inputs`` are the model's, by name. Raises BadOption for a model that predicts nothing.
    """
    predicts = [(position, one) for position, one in enumerate(kinds) if one.kind in PREDICTIONS]
    if not predicts:
        raise BadOption(
            "the outputs of the model predict nothing, so two passes have nothing to be consistent in",
            hint="scores are of next tokens, of classes that the data have labels of, or an output named logits",
        )

    def divergence(first: Any, second: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        sums = [
            divergences(*(_rows(flat(output)[position], one, batch, inputs) for output in (first, second)))
            for position, one in predicts
        ]
        return torch.stack([total for total, _ in sums]).sum(), torch.stack([count for _, count in sums]).sum()

    return Consistency(weight, divergence)


def _rows(value: Tensor, kind: OutputKind, batch: Mapping[str, Tensor], inputs: Sequence[str]) -> Tensor:
    """[N, C] without rows of padding."""
    rows = value.reshape(-1, 1) if kind.kind == "values" else value.flatten(0, -2)
    return rows if kind.mask is None else rows[batch[inputs[kind.mask]].flatten() != 0]


def _kl(value_NC: Tensor, wanted_NC: Tensor, temperature: float) -> Tensor:
    logs, wanted = (nn.functional.log_softmax(x / temperature, 1) for x in (value_NC, wanted_NC))
    return temperature**2 * F.kl_div(logs, wanted, reduction="batchmean", log_target=True)


def _mse(value_NC: Tensor, wanted_NC: Tensor, temperature: float) -> Tensor:
    return F.mse_loss(value_NC, wanted_NC) / wanted_NC.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def _cosine(value_NC: Tensor, wanted_NC: Tensor, temperature: float) -> Tensor:
    return 1 - F.cosine_similarity(value_NC, wanted_NC, dim=1).mean()


_DISTANCES = {"kl": _kl, "mse": _mse, "cosine": _cosine}
