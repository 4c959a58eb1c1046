"""``torchrun --nproc-per-node N -m moeify.run OUT.pt2 --data ...``: a converted model on 1 to N ranks.

Without torchrun it is one rank. The numbers do not depend on how many there are.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeify.cli import flags, options
from moeify.cli.main import main as run_command
from moeify.cli.output import only_json, write_json
from moeify.errors import UnreadableFile, UsageError

if TYPE_CHECKING:
    from torch import nn

    from moeify.cli.run_summary import Answer
    from moeify.data.examples import Options
    from moeify.distributed.runner_data import Examples
    from moeify.distributed.runner_group import Ranks
    from moeify.distributed.runner_loss import Consistency, Loss
    from moeify.distributed.schedule import Schedule
    from moeify.distributed.training import Saving

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL.pt2", help="What 'moeify convert' wrote.")],
    data: options.Examples = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Of a text: its folder, a .gguf file, or 'bytes'.")
    ] = None,
    sequence: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a piece of text.")] = 128,
    image_mean: options.ImageMean = None,
    image_std: options.ImageStd = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Examples of all ranks together.")] = 8,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="pkg.mod:fn",
            help="fn(output, batch).  [next tokens; of classes, an image's folder or the tensor 'labels' in the data]",
        ),
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Write what the model gives for every example.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Train for so many steps.")] = None,
    rate: Annotated[float, typer.Option("--lr", metavar="X", help="AdamW's learning rate.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="AdamW's.")] = 0.01,
    clip: Annotated[float, typer.Option(metavar="X", help="Largest norm of the gradients, 0 for any.")] = 1.0,
    consistency: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="X",
            help="Run each batch twice and add X times how far the two predictions are apart (KL, in nats): for "
            "routers or dropout that are random in training.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order of examples and of dropout.")] = 0,
    checkpoints: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where checkpoints are, for any number of ranks.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps from one checkpoint to the next.")] = 100,
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Newest checkpoints that stay.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
    write: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write the last checkpoint as one .pt2 or .safetensors at the end."),
    ] = None,
    mode: Annotated[str, typer.Option(metavar="NAME", help="How rows travel: dropless or capacity.")] = "dropless",
    expert_ranks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks that share the experts.  [all]")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu (gloo), or cuda: a GPU to each rank of a machine (NCCL).")
    ] = "cpu",
    timeout: Annotated[float, typer.Option(min=1.0, metavar="S", help="Seconds that an exchange may take.")] = 300.0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate or train MODEL with its experts spread over the ranks that torchrun started."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from moeify.data.examples import Options
    from moeify.distributed import schedule as schedules
    from moeify.distributed import training

    if outputs is not None and (steps is not None or outputs.suffix != ".safetensors"):
        raise UsageError("--outputs FILE.safetensors is for a run without --steps")
    if (write is not None or resume) and checkpoints is None:
        raise UsageError("--write and --resume need to know where checkpoints are", hint="give --checkpoints FOLDER")
    if write is not None and write.suffix not in (".pt2", ".safetensors"):
        raise UsageError(f"cannot tell what to write to {write}", hint="end it in .pt2 or .safetensors")
    if data is None and (write is None or steps is not None):
        raise UsageError("there is nothing to run on", hint="give --data FILE")
    if consistency and steps is None:
        raise UsageError("--consistency is for training", hint="give --steps")
    schedule = schedules.Schedule(steps, batch, rate, weight_decay, clip, seed) if steps is not None else None
    saving = training.Saving(checkpoints, every, keep, resume) if checkpoints is not None else None

    mean, std = flags.numbers("--image-mean", image_mean), flags.numbers("--image-std", image_std)
    how = Options(tokenizer, sequence, mean, std, batch, seed)
    answer: Answer = {} if as_json else None

    def work(ranks: Ranks) -> int:
        code = 0
        if data is not None:
            task = _task(model, data, how, loss, ranks, mode, consistency, schedule is not None)
            if schedule is not None:
                code = _train(task, ranks, schedule, saving, answer)
            else:
                _evaluate(task, ranks, batch, saving, outputs, answer)
            ranks.total([0.0], "the end")  # the first rank's process may hold the store that the others still read
        if write is not None and ranks.rank == 0:
            assert checkpoints is not None
            _write(model, checkpoints, write)
        return code

    with only_json(as_json):
        code = record(_on_ranks)(work, expert_ranks, timeout, device)
    if answer:
        write_json(answer)
    if code:
        raise SystemExit(code)  # typer.Exit(130) would be taken for a Ctrl-C that ended the command at once


def _on_ranks(work: Callable[[Ranks], int], expert_ranks: int | None, seconds: float, device: str) -> int:
    """``work`` as one of the ranks; where it fails, the others hear why."""
    from moeify.distributed import runner_group
    from moeify.distributed.lost import telling

    ranks = runner_group.start(expert_ranks, seconds, device)
    code = None
    try:
        with telling(ranks.groups.board, ranks.rank):
            code = work(ranks)
    finally:
        # Where a rank has failed, the others are in the middle of an exchange: ending the process tells them.
        if code is not None or ranks.size == 1:
            runner_group.stop()
    return code


@dataclass(frozen=True)
class _Task:
    """A bound module with what it is to run on. ``ids`` is the input of a language model's tokens."""

    module: nn.Module
    examples: Examples
    loss: Loss | None
    ids: str | None
    consistency: Consistency | None
    fixed: bool  # whether the model takes one number of examples only
    masks: dict[str, str]  # by the path of a block: the input that says what is padding

    def tokens(self, examples: int) -> int:
        """Of so many examples; 0 where the model reads none."""
        return 0 if self.ids is None else examples * self.examples.tensors[self.ids].shape[1]


def _task(
    model: Path, data: Path, how: Options, loss: str | None, ranks: Ranks, mode: str, consistency: float, train: bool
) -> _Task:
    from moeify.api import train_losses
    from moeify.api.load import read_graph
    from moeify.distributed import runner_data, runner_loss
    from moeify.distributed.binding import bind
    from moeify.ir import language
    from moeify.ir.report import Report
    from moeify.training.masks import masks_of_blocks
    from moeify.training.watch import observe_if_asked

    own = runner_loss.user_loss(loss) if loss else None  # before the model is read
    program, metadata = read_graph(model)
    found = language.language_of(program)
    examples = runner_data.read(data, program, how, model)
    fixed = runner_data.check_fixed(program.inputs, how.batch, ranks.size)
    of_labels, two = None, None
    if train or examples.classes:
        kinds = train_losses.kinds_of(program, examples, by_labels=own is None)
        train_losses.check_classes(program, kinds, examples, str(data))
        of_labels = train_losses.task_loss(program, kinds, examples)
        two = train_losses.consistency_of(kinds, examples.inputs, consistency) if consistency else None
    report = Report.from_dict(metadata["report"])
    positions = masks_of_blocks(program, {block.anchor: block.path for block in report.blocks})
    masks = {path: program.inputs[position].name for path, position in positions.items()}
    module = bind(program, ranks.groups, options=f"mode={mode}")
    module.moeify_report = report  # type: ignore[assignment]
    observe_if_asked(module)
    causal = own is None and found is not None and language.is_causal(module, program, found)  # on the CPU's examples
    module.to(ranks.device)
    if causal and found is not None:
        return _Task(module, examples, found.loss, found.ids, two, fixed is not None, masks)
    return _Task(module, examples, own or of_labels, None, two, fixed is not None, masks)


def _train(task: _Task, ranks: Ranks, schedule: Schedule, saving: Saving | None, answer: Answer) -> int:
    from moeify.cli.run_summary import Watch
    from moeify.distributed import training

    if task.loss is None:
        raise UsageError(
            "the model gives no scores of next tokens, and the data have no labels for its classes",
            hint="give --loss pkg.mod:function",
        )
    with Watch(ranks, schedule.steps, answer) as watch:
        made = training.train(
            task.module, ranks, task.examples, task.loss, schedule, saving,
            masks=task.masks, consistency=task.consistency, done=watch.step,
        )  # fmt: skip
    watch.trained(made, task.tokens(schedule.batch))
    return _stopped(made.stopped) if made.stopped else 0


def _stopped(by: str) -> int:
    """128 + the number of the signal, as a shell has it. A rank that another one's signal ends was asked to end, as by
    SIGTERM: 143."""
    return 128 + signal.Signals.__members__.get(by, signal.SIGTERM)


def _evaluate(
    task: _Task, ranks: Ranks, batch: int, saving: Saving | None, outputs: Path | None, answer: Answer
) -> None:
    from moeify.cli.run_summary import Watch
    from moeify.distributed import checkpoint, runner_forward

    source = None
    if saving is not None and saving.resume:
        source = _last(saving.folder)
        checkpoint.load(task.module, ranks.mesh, source)
    with Watch(ranks, -(-task.examples.count // batch), answer) as watch:
        made, gathered = runner_forward.evaluate(
            task.module, ranks, task.examples, task.loss, batch,
            whole_batches=task.fixed, ids=task.ids, outputs=outputs is not None, done=watch.batch,
        )  # fmt: skip
    if outputs is not None and ranks.rank == 0:
        from safetensors.torch import save_file

        from moeify.backends.writing import atomically

        with atomically(outputs) as temporary:
            save_file({f"output{i}": value for i, value in enumerate(gathered)}, temporary)
    watch.evaluated(made, source, outputs)


def _write(model: Path, checkpoints: Path, output: Path) -> None:
    from moeify.distributed import checkpoint_whole

    source = _last(checkpoints)
    if output.suffix == ".safetensors":
        checkpoint_whole.consolidate(source, output)
        return
    from moeify.api.train_writing import write_trained

    note = f"trained: the weights are those of {source}"
    write_trained(model, output, note, lambda program: checkpoint_whole.load_program(program, source))


def _last(checkpoints: Path) -> Path:
    from moeify.distributed import checkpoint_folder

    found = checkpoint_folder.latest(checkpoints)
    if found is None:
        raise UnreadableFile(f"there is no checkpoint in {checkpoints}")
    return found


def main(arguments: Sequence[str]) -> int:
    """One rank's exit code: that of the command line, or 128 + N for training that signal N ended after a step."""
    rank = int(os.environ["RANK"]) if "RANK" in os.environ else None
    try:
        return run_command(arguments, app, "python -m moeify.run", rank)
    except SystemExit as stopped:
        return int(stopped.code or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
