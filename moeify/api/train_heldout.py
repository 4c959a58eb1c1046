"""What a model is worth on examples that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeify.api.output_kinds import OutputKind
from moeify.api.quality import output_quality
from moeify.api.quality_report import OutputQuality
from moeify.api.quality_runs import OutputMeasures, add_output
from moeify.api.train_losses import IGNORED, scores_and_labels
from moeify.api.train_teacher import Teacher
from moeify.distributed.runner_data import Examples
from moeify.distributed.runner_forward import device_of, run_model
from moeify.distributed.runner_loss import Loss
from moeify.ir.program import flat
from moeify.verify.fidelity import LargestError, Predictions, RowErrors


@dataclass(frozen=True)
class HeldOut:
    """After ``step`` steps. ``loss`` is the task's mean loss, ``perplexity`` its exp for a language model, ``accuracy``
    the share of labels that are right; ``against_teacher`` has a row for each output of the model.
    """

    step: int
    examples: int
    loss: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    against_teacher: list[OutputQuality] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(one), "perplexity_ratio": one.perplexity_ratio} for one in self.against_teacher]
        return {**asdict(self), "against_teacher": rows}


@dataclass(frozen=True)
class HeldOutExamples:
    """What is measured on, ``batch`` examples at a time, and what is measured. ``next_tokens`` says that the loss is of
    them, ``classes`` is the position of the output that the labels are of.
    """

    examples: Examples
    batch: int
    kinds: Sequence[OutputKind]
    loss: Loss | None = None
    next_tokens: bool = False
    classes: int | None = None
    teacher: Teacher | None = None

    def batches(self, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """In order; what is left over where the model takes a fixed number is left out by the one who made it."""
        for start in range(0, self.examples.count, self.batch):
            yield self.examples.take(range(start, min(start + self.batch, self.examples.count)), device)

    def measure(
        self, module: nn.Module, step: int, before: Callable[[Mapping[str, Tensor]], None] = lambda batch: None
    ) -> HeldOut:
        """In evaluation; the module is left in the mode it was in. ``before`` sees each batch first."""
        training = module.training
        module.eval()
        total, terms, right, labels = 0.0, 0.0, 0.0, 0
        against = [OutputMeasures(kind, RowErrors(), LargestError(), Predictions()) for kind in self.kinds]
        with torch.no_grad():
            for batch in self.batches(device_of(module)):
                before(batch)
                output = run_model(module, self.examples, batch)
                size = len(next(iter(batch.values())))
                if self.loss is not None:
                    value, count = self.loss(output, batch, size)
                    total, terms = total + float(value), terms + count
                if self.classes is not None:
                    scores, wanted = scores_and_labels(output, batch, self.classes)
                    right += float((scores.argmax(1) == wanted).sum())
                    labels += int((wanted != IGNORED).sum())
                if self.teacher is not None:
                    values = flat(output)
                    inputs = [batch[name] for name in self.examples.inputs]
                    for one, value, dense in zip(against, values, self.teacher.outputs(batch, values), strict=True):
                        add_output(one, value, dense, inputs)
        module.train(training)
        mean = total / terms if terms else None
        return HeldOut(
            step,
            self.examples.count,
            mean,
            math.exp(mean) if self.next_tokens and mean is not None and mean < 700 else None,  # of float64
            right / labels if labels else None,
            [output_quality(one) for one in against] if self.teacher is not None else [],
        )
