"""Choosing what to split, and how far, for a quality or a speed that is then measured."""

from __future__ import annotations

import time as clock
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify import frontend
from moeify.api.convert import captured, check_output
from moeify.api.progress import Progress, Silent
from moeify.api.tune_goal import TEST_TOKENS, TIME_TOKENS, TRIES, Goal
from moeify.api.tune_report import TuneReport
from moeify.api.tune_run import Tuned, Tuning
from moeify.api.tune_stages import Stages
from moeify.api.user_data import UserData
from moeify.backends.pt2.archive import Pt2
from moeify.backends.writing import atomically
from moeify.data.examples import Options
from moeify.errors import OutputNotWritten, UsageError
from moeify.ir.profile import Profile
from moeify.ir.recipe import TOKENS, Recipe
from moeify.tuning.choices import PARTS


def tune(
    model: nn.Module | str | Path,
    data: Any,
    *,
    keep: float | None = None,
    speedup: float | None = None,
    flops: float | None = None,
    test: Any = None,
    profile: Profile | str | Path | None = None,
    inputs: Sequence[str] | Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None = None,
    tokenizer: str | Path | None = None,
    sequence: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    classes: bool = False,
    blocks: str = "all",
    include: tuple[str, ...] = (),
    parts: int = PARTS,
    tries: int = TRIES,
    points: int = 0,
    fit_tokens: int = TOKENS,
    test_tokens: int = TEST_TOKENS,
    time_tokens: int = TIME_TOKENS,
    threads: int | None = None,
    time: bool = True,
    seed: int = 0,
) -> Tuned:
    """Split a dense model as far as ``keep`` allows, or ``speedup`` or ``flops`` need, the blocks that can bear it most
    first.

    ``keep=0.99`` asks for at least 99 % of a figure that is measured on data which nothing was fitted to: dense over
    converted perplexity of a causal language model, the share of predictions that stay of a classifier (``classes``:
    outputs [batch, classes] are scores, also where they are not named logits), the mean cosine of embeddings.
    ``speedup=1.3`` asks for the dense model's time over the converted one's with ``time_tokens`` tokens, measured in
    ONNX Runtime where that is installed (and ``time`` is on), else expected. ``flops=0.5`` asks for at most half of the
    feed-forward blocks' work, and the least expected loss for it.

    ``model`` is a module or a path and is not changed. A part of ``data`` (what ``moeify.profile`` takes) is fitted to,
    another chosen by and a third measured on, or ``test`` is. ``profile`` is one that was made before. At most
    ``tries`` conversions are made until the target is met, and ``points`` more along the frontier to show it.
    ``moeify.convert(model, tuned.recipe, profile=tuned.profile)`` makes the same model in module form. Raises Refused
    when nothing that was tried meets the target, and what reading the data raises.
    """
    goal = Goal(
        keep, speedup, time_tokens, threads, time, parts, tries, fit_tokens, test_tokens, classes, test, points, flops
    )  # fmt: skip
    options = Options(str(tokenizer) if tokenizer else None, sequence, image_mean, image_std, seed=seed)
    recipe = Recipe(blocks=blocks, include=include, seed=seed)
    given = UserData(data, profile, options)
    goal.check()
    given.check()
    UserData(test).check()
    if isinstance(model, nn.Module):
        program, name, place = frontend.capture(model, inputs), type(model).__name__, None
    elif inputs is not None and (isinstance(inputs, (Mapping, str)) or not all(isinstance(x, str) for x in inputs)):
        raise UsageError("the inputs of a model file are specs", hint='write "input_ids=int64[batch=2,seq=16]"')
    else:
        program, _ = captured(model, [str(text) for text in inputs or ()], None, (), Silent())
        name, place = str(model), Path(model)
    return Tuning(program, name, place, goal, given, recipe, Stages(Silent())).run()


def tune_file(
    model: str | Path,
    data: str | Path,
    *,
    goal: Goal,
    options: Options,
    recipe: Recipe,
    profile: str | Path | None = None,
    output: str | Path | None = None,
    recipe_output: str | Path | None = None,
    inputs: Sequence[str] = (),
    factory: str | None = None,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> TuneReport:
    """``moeify tune``: read a model file, choose, convert, measure, write what was asked for.

    ``output`` is the converted model (a ``.pt2``), ``recipe_output`` its recipe; None is not written. Raises a
    MoeifyError of the cause, Refused when the target is not met; nothing is written then.
    """
    started = clock.perf_counter()
    goal.check()
    given = UserData(data, profile, options)
    given.check()
    UserData(goal.test).check()
    if output is not None:
        check_output(Path(output), Path(model))
    if recipe_output is not None and not Path(recipe_output).absolute().parent.is_dir():
        raise OutputNotWritten(f"cannot write {recipe_output}: the folder {Path(recipe_output).parent} does not exist")
    stages = Stages(progress or Silent())
    with stages.of("capture"):
        program, notes = captured(model, inputs, factory, allow, stages)
    tuned = Tuning(program, str(model), Path(model), goal, given, recipe, stages).run()
    report = tuned.report
    report.notes = [*notes, *report.notes]
    report.conversion.notes = [*notes, *report.conversion.notes]
    with stages.of("write"):
        if output is not None:
            stages.stage(f"writing {output}")
            report.output = report.conversion.output = str(output)
            Pt2().write(tuned.program, report.conversion, Path(output))
        if recipe_output is not None:
            report.recipe_output = str(recipe_output)
            with atomically(Path(recipe_output)) as temporary:
                temporary.write_text(tuned.recipe.to_toml())
    report.stages = stages.seconds
    report.seconds = clock.perf_counter() - started
    return report
