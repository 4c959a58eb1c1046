"""Training a converted model in one process: data in, a trained ``.pt2`` out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.api.convert import check_output
from moeify.api.progress import Progress, Silent
from moeify.api.train_heldout import HeldOut
from moeify.api.train_losses import has_labels
from moeify.api.train_options import TrainOptions
from moeify.api.train_report import TrainReport
from moeify.api.train_task import Data, Dense, Task, task_of
from moeify.api.train_writing import copy_weights, write_trained
from moeify.data.tensors import LABELS
from moeify.distributed import training
from moeify.distributed.training import Saving, Trained
from moeify.errors import Refused, RuntimeUnavailable, UsageError
from moeify.training.recorder import routing
from moeify.training.routing_report import RoutingReport


def train(
    model: str | Path,
    data: Data,
    output: str | Path | None = None,
    *,
    test: Data | None = None,
    teacher: Dense | None = None,
    **options: Any,
) -> TrainReport:
    """Train a converted ``.pt2`` on data and write it, if ``output`` is said; ``report.module`` is the trained module.

        moeify.train("split.pt2", "text.txt", "trained.pt2", tokenizer="bytes", teacher=dense, steps=200, lr=3e-4)

    ``data`` and ``test`` are paths of a text, a folder of images or tensors, or tensors by name whose rows are
    examples. ``teacher`` is the dense module or its file. ``options`` are the fields of ``TrainOptions``. Without
    ``checkpoints`` none are kept where there is no output, otherwise in ``OUTPUT.checkpoints`` until the output is
    written.

    SIGTERM and SIGINT end the run after a step, with a checkpoint: ``report.run.stopped`` says so, and nothing is
    written. Raises what reading the model and the data raises, UsageError where there is nothing to train on,
    NonFiniteValues for a loss that is NaN or infinity.
    """
    named = {"data": data, "test": test, "teacher": teacher}
    options.update({name: str(value) for name, value in named.items() if isinstance(value, (str, Path))})
    told = TrainOptions(**options)
    return train_file(model, output, told, data=data, test=test, teacher=teacher)


def train_file(
    model: str | Path,
    output: str | Path | None,
    options: TrainOptions,
    *,
    data: Data | None = None,
    test: Data | None = None,
    teacher: Dense | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    step: Callable[[Trained], None] = lambda made: None,
    measured: Callable[[HeldOut], None] = lambda found: None,
) -> TrainReport:
    """``moeify train``. Data and teacher are those of the options unless they are given themselves. ``step`` hears of
    each step, ``measured`` of each measurement.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    data = options.data if data is None else data
    test = options.test if test is None else test
    teacher = options.teacher if teacher is None else teacher
    path, target = Path(model), Path(output) if output is not None else None
    if data is None:
        raise UsageError("there is nothing to train on", hint="give --data FILE")
    if target is not None:
        if target.exists() and path.exists() and target.samefile(path):
            raise UsageError(f"the output {target} is the model that is trained", hint="choose another --output")
        check_output(target, path)
    device = _device(options.device)
    saving = _saving(options, target, resume)
    progress.stage(f"reading {path}")
    task = task_of(path, data, test, teacher, options, device, progress)
    progress.stage("training", total=options.steps)
    held_out: list[HeldOut] = []

    def measure(done: int) -> None:
        if task.held_out is not None:
            held_out.append(task.held_out.measure(task.module, done))
            measured(held_out[-1])

    def after(made: Trained) -> None:
        step(made)
        every = options.eval_every
        if every and made.steps % every == 0 and made.steps < options.steps and not made.stopped:
            measure(made.steps)

    run = training.train(
        task.module, task.ranks, task.examples, task.loss, options.schedule(), saving,
        masks=task.masks, consistency=task.consistency, facts=task.facts, begun=measure, done=after,
    )  # fmt: skip
    task.module.eval()
    report = TrainReport(
        str(model), str(device), task.loss_is, task.examples.count, task.tokens * options.batch,
        task.trained, task.parameters, run, task.module, task.examples.classes, held_out, notes=task.notes,
    )  # fmt: skip
    if not run.stopped:
        found, report.routing = _in_the_end(task, run.steps, report.notes)
        if task.held_out is not None:
            held_out.append(found)
            measured(found)
        if target is not None:
            progress.stage(f"writing {target}")
            note = f"trained: {run.steps} steps on {options.data or 'data from Python'}, {task.loss_is}"
            write_trained(path, target, note, lambda into: copy_weights(task.module, into), options.router_losses)
            report.output = str(target)
            if options.checkpoints is None and saving is not None:
                shutil.rmtree(saving.folder)
                run.saved = None
    report.seconds = time.perf_counter() - began
    return report


def _device(name: str | None) -> torch.device:
    """Raises RuntimeUnavailable, or UsageError for what is no device."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}", hint="choose cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable("there is no GPU that torch can use here", hint="choose --device cpu")
    return device


def _saving(options: TrainOptions, target: Path | None, resume: bool) -> Saving | None:
    if options.checkpoints is not None:
        folder = Path(options.checkpoints)
    elif target is not None:
        folder = target.with_suffix(".checkpoints")
    elif resume:
        raise UsageError("it is not said where the checkpoints are", hint="give --checkpoints FOLDER")
    else:
        return None
    return Saving(folder, options.save_every, options.keep, resume)


def _in_the_end(task: Task, steps: int, notes: list[str]) -> tuple[HeldOut, RoutingReport | None]:
    """The last measurement, and what the routers do meanwhile. Without examples that are held out they are watched on
    some that are not."""

    def before(batch: Mapping[str, Tensor]) -> None:
        labels = batch[LABELS] if labelled else None
        masks = {block: batch[name] for block, name in task.masks.items()}
        seen.next(mask=masks, labels=task.labels.of(batch, labels))

    examples = task.routed.examples
    labelled = has_labels(examples)
    if not examples.count:
        notes.append("the routers were not watched: there are too few examples for a batch")
        return task.routed.measure(task.module, steps), None
    try:
        with routing(task.module) as seen:
            return task.routed.measure(task.module, steps, before), seen.report()
    except Refused as error:  # of a graph whose routers cannot be told, before anything is run
        notes.append(f"the routers were not watched: {error.what}")
        return task.routed.measure(task.module, steps), None
