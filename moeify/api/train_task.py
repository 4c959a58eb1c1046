"""What a training run needs, made of a file, data and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.api.load import read_graph
from moeify.api.output_kinds import OutputKind
from moeify.api.progress import Progress
from moeify.api.train_heldout import HeldOutExamples
from moeify.api.train_losses import check_classes, classes_of, consistency_of, distance_to, kinds_of, mixed, task_loss
from moeify.api.train_options import TrainOptions, flag
from moeify.api.train_teacher import Teacher, read_teacher
from moeify.data import images
from moeify.data.examples import Options
from moeify.data.tensors import LABELS
from moeify.distributed import runner_data
from moeify.distributed.alone import alone, bind_alone
from moeify.distributed.runner_data import Examples
from moeify.distributed.runner_group import Ranks
from moeify.distributed.runner_loss import Consistency, Loss, user_loss
from moeify.errors import BadInputSpec, UsageError
from moeify.ir import devices
from moeify.ir.language import is_causal, language_of, token_input_of
from moeify.ir.program import Program
from moeify.ir.report import Report
from moeify.nn.losses import LOSSES
from moeify.training.masks import masks_of_blocks
from moeify.training.only import train_only
from moeify.training.row_labels import RowLabels, row_labels
from moeify.training.watch import observe_if_asked

Data = str | Path | Mapping[str, Tensor]
Dense = nn.Module | str | Path


@dataclass(frozen=True)
class Task:
    """A module on its device, the examples it learns from and those that are held out, of which the loss is also asked
    when nothing is: ``routed``. ``tokens`` are those of an example. ``masks`` gives, by the path of a block, the input
    that says what is padding, and ``labels`` which label its rows have. ``trained`` and ``parameters`` count elements.
    """

    module: nn.Module
    ranks: Ranks
    examples: Examples
    held_out: HeldOutExamples | None
    routed: HeldOutExamples
    loss: Loss
    loss_is: str
    consistency: Consistency | None
    tokens: int
    masks: dict[str, str]
    labels: RowLabels
    facts: dict[str, Any]
    trained: int
    parameters: int
    notes: list[str]


def task_of(
    path: Path,
    data: Data,
    test: Data | None,
    teacher: Dense | None,
    options: TrainOptions,
    device: torch.device,
    progress: Progress,
) -> Task:
    """Raises what reading raises, UsageError where there is nothing to train on, BadInputSpec for data that do not
    fit."""
    own = user_loss(options.loss) if options.loss else None  # before the model is read
    program, metadata = read_graph(path)
    report = Report.from_dict(metadata["report"])
    if options.router_losses is not None:
        for text in options.router_losses:
            LOSSES.parse(text)
        report.recipe = {**report.recipe, "router_losses": list(options.router_losses)}
    size = options.batch // options.accumulate
    fixed = runner_data.check_fixed(program.inputs, size, 1) is not None
    place = _preprocessing(path, teacher)
    examples, rest, notes = _examples(program, data, test, options, size if fixed else 1, place)
    kinds = kinds_of(program, examples, own is None and (teacher is None or options.distill_weight < 1))
    learnt = None
    if teacher is not None:
        learnt = read_teacher(teacher, program, device, progress, factory=options.factory, allow=options.allow)
    of_task = own or task_loss(program, kinds, examples)
    notes += check_classes(program, kinds, examples, _named(data, "the data"))
    next_tokens = own is None and any(one.kind == "next tokens" for one in kinds)
    loss, loss_is = _loss(of_task, "next tokens" if next_tokens else options.loss or LABELS, learnt, kinds, options)
    held_out = None
    if rest is not None:
        held_out = HeldOutExamples(rest, size, kinds, of_task, next_tokens, classes_of(kinds, rest), learnt)
    few = min(examples.count, options.test_examples)
    few -= few % (size if fixed else 1)
    consistency = None
    if options.consistency:
        consistency = consistency_of(kinds, examples.inputs, options.consistency)
        loss_is += f" + {options.consistency:g} x consistency"
    paths = {block.anchor: block.path for block in report.blocks}
    positions, of_rows = masks_of_blocks(program, paths), row_labels(program, paths)
    ids = token_input_of(program)
    ranks = alone()
    module = bind_alone(program, ranks)
    if not options.dropout:
        module.drop_dropout()
    devices.move(module, device)
    module.moeify_report = report  # type: ignore[assignment]
    observe_if_asked(module)
    return Task(
        module,
        ranks,
        examples,
        held_out,
        held_out or HeldOutExamples(examples.split(examples.count - few)[0], size, kinds),
        loss,
        loss_is,
        consistency,
        examples.tensors[ids.name].shape[1] if ids is not None else 0,
        {block: program.inputs[at].name for block, at in positions.items()},
        of_rows,
        _facts(options, report, learnt),
        *train_only(module, [block.anchor for block in report.blocks if block.converted], options.only),
        notes,
    )


def _preprocessing(path: Path, teacher: Dense | None) -> Path:
    """The model beside which there is said how images are scaled: the one that is trained, or its teacher."""
    if isinstance(teacher, (str, Path)) and images.preprocessor_of(path) is None:
        return Path(teacher)
    return path


def _examples(
    program: Program, data: Data, test: Data | None, options: TrainOptions, multiple: int, place: Path
) -> tuple[Examples, Examples | None, list[str]]:
    """To train on, held out, and notes. What is held out is a multiple of so many."""
    examples = _read(data, program, options, place)
    notes = list(examples.notes)
    rest: Examples | None
    if test is not None:
        rest = _read(test, program, options, place)
        _check_alike(examples, rest, _named(data, "the data"), _named(test, "the data to test on"))
    else:
        last = min(round(examples.count * options.test_part), options.test_examples, examples.count - 1)
        last -= last % multiple
        if options.test_part and not last:
            return examples, None, [*notes, "there are too few examples to hold any out: give --test FILE"]
        examples, rest = examples.split(last) if last else (examples, None)
    if rest is None:
        return examples, None, [*notes, "nothing is held out"]
    count = min(rest.count, options.test_examples)
    count -= count % multiple
    if not count:
        raise BadInputSpec(f"{rest.count} examples to test on do not fill a batch of {multiple}")
    return examples, rest.split(rest.count - count)[0], notes


def _check_alike(examples: Examples, rest: Examples, data: str, test: str) -> None:
    """Raises BadInputSpec where what is tested on has no labels, or other classes, than what is trained on."""
    if LABELS in examples.tensors and LABELS not in rest.tensors:
        raise BadInputSpec(f"{data} has labels and {test} has none", hint="give labels to both, or to neither")
    if examples.classes and rest.classes and examples.classes != rest.classes:
        only = [
            f"only {name} has {', '.join(missing[:5])}{' ...' if missing[5:] else ''}"
            for name, has, other in ((data, examples, rest), (test, rest, examples))
            if (missing := [one for one in has.classes if one not in other.classes])
        ]
        raise BadInputSpec(
            f"the classes of {data} and {test} are not the same: {', '.join(only)}",
            hint="give both the same sub-folders: their order says which score of the model is whose",
        )


def _named(data: Data, otherwise: str) -> str:
    return otherwise if isinstance(data, Mapping) else str(data)


def _read(data: Data, program: Program, options: TrainOptions, place: Path) -> Examples:
    if isinstance(data, Mapping):
        return runner_data.fitted(data, program.inputs, "the data", options.seed)
    language = language_of(program)
    framed = language is None or not is_causal(program.graph_module, program, language)
    how = Options(
        options.tokenizer, options.sequence, options.image_mean, options.image_std, options.batch, options.seed
    )
    found = runner_data.read(Path(data), program, how, place, framed=framed)
    return found.mixed() if found.images is not None else found  # a folder has one class after the other


def _loss(
    of_task: Loss | None, name: str, teacher: Teacher | None, kinds: list[OutputKind], options: TrainOptions
) -> tuple[Loss, str]:
    """The loss, and what it is in words."""
    if teacher is None:
        if options.distill is not None or options.distill_weight != 1:
            raise UsageError("there is no teacher to learn from", hint="give --teacher DENSE")
        if of_task is None:
            raise UsageError(
                f"the model gives no scores of next tokens, and the data have no {LABELS} for its classes",
                hint="give --loss pkg.mod:function, --teacher DENSE, or images in a sub-folder for each class",
            )
        return of_task, name
    distance, distance_is = distance_to(teacher, kinds, options.distill, options.temperature)
    weight = options.distill_weight
    if weight == 1:
        return distance, f"{distance_is} to the teacher"
    if of_task is None:
        raise UsageError(
            "there is no loss of the task beside the teacher", hint="leave --distill-weight out, or give --loss"
        )
    return mixed(distance, of_task, weight), f"{weight:g} x {distance_is} to the teacher + {1 - weight:g} x {name}"


def _facts(options: TrainOptions, report: Report, teacher: Teacher | None) -> dict[str, Any]:
    """What must be the same when the run goes on."""
    facts = options.facts()
    if teacher is not None:
        facts["teacher"] = teacher.name
    return {**facts, **{f"recipe {flag(name)}": value for name, value in report.recipe.items()}}
