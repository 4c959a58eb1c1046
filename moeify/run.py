"""``torchrun --nproc-per-node N -m moeify.run OUT.pt2 --data ...``: a converted model on 1 to N ranks.

Without torchrun it is one rank. The numbers do not depend on how many there are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeify.cli import options
from moeify.cli.main import main as run_command
from moeify.cli.output import Screen, only_json, write_json
from moeify.errors import BadOption, MoeifyError, UsageError

if TYPE_CHECKING:
    from moeify.distributed.runner_data import Examples
    from moeify.distributed.runner_forward import Evaluation
    from moeify.distributed.runner_group import Ranks
    from moeify.distributed.runner_loss import Language, Loss
    from moeify.distributed.training import Saving, Schedule, Trained
    from moeify.ir.program import Program

_COLUMN = 13
_STOPPED = 143  # 128 + SIGTERM, as a shell has it
_TEXT = (".txt", ".text", ".md")
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL.pt2", help="What 'moeify convert' wrote.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .txt with --tokenizer, or tensors by input name, an example to a row."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Of a text: its folder, a .gguf file, or 'bytes'.")
    ] = None,
    sequence: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a piece of text.")] = 128,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Examples of all ranks together.")] = 8,
    loss: Annotated[
        str | None, typer.Option(metavar="pkg.mod:fn", help="fn(output, batch); next tokens where there are any.")
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Write what the model gives for every example.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Train for so many steps.")] = None,
    rate: Annotated[float, typer.Option("--lr", metavar="X", help="AdamW's learning rate.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="AdamW's.")] = 0.01,
    clip: Annotated[float, typer.Option(metavar="X", help="Largest norm of the gradients, 0 for any.")] = 1.0,
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
    timeout: Annotated[float, typer.Option(min=1.0, metavar="S", help="Seconds that an exchange may take.")] = 300.0,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu (gloo) or cuda (NCCL).")] = "cpu",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate or train MODEL with its experts spread over the ranks that torchrun started."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from moeify.distributed import training

    if outputs is not None and (steps is not None or outputs.suffix != ".safetensors"):
        raise UsageError("--outputs FILE.safetensors is for a run without --steps")
    if (write is not None or resume) and checkpoints is None:
        raise UsageError("--write and --resume need to know where checkpoints are", hint="give --checkpoints FOLDER")
    if write is not None and write.suffix not in (".pt2", ".safetensors"):
        raise UsageError(f"cannot tell what to write to {write}", hint="end it in .pt2 or .safetensors")
    if data is None and (write is None or steps is not None):
        raise UsageError("there is nothing to run on", hint="give --data FILE")
    schedule = training.Schedule(steps, batch, rate, weight_decay, clip, seed) if steps is not None else None
    saving = training.Saving(checkpoints, every, keep, resume) if checkpoints is not None else None

    def work(ranks: Ranks) -> int:
        from moeify.api.load import read_graph

        program, _ = read_graph(model)
        found = _language(program)
        code = 0
        if data is not None:
            examples = _examples(program, found, data, tokenizer, sequence, seed)
            place = _bound(program, ranks, mode)
            measure = _loss(loss, found, place, ranks)
            if schedule is not None:
                code = _train(place, ranks, examples, measure, schedule, saving, as_json, found)
            else:
                _evaluate(place, ranks, examples, measure, batch, saving, outputs, as_json, found)
        if write is not None and ranks.rank == 0:
            _write(model, saving, write)
        return code

    with only_json(as_json):
        code = record(_on_ranks)(work, device, expert_ranks, timeout)
    if code:
        raise typer.Exit(code)


def _on_ranks(work: Callable[[Ranks], int], device: str, expert_ranks: int | None, seconds: float) -> int:
    """``work`` as one of the ranks; where it fails, the others hear why."""
    from moeify.distributed import runner_group

    ranks = runner_group.start(device, expert_ranks, seconds)
    try:
        code = work(ranks)
    except MoeifyError as error:
        ranks.groups.board.stop(ranks.rank, error.what)
        raise
    except Exception as error:
        ranks.groups.board.stop(ranks.rank, f"{type(error).__name__}: {error}")
        raise
    runner_group.stop()
    return code
