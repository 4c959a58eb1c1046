"""Profiling a dense model: what its hidden units do on the user's data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify import frontend
from moeify.api.convert import captured, require_blocks
from moeify.api.progress import Progress, Silent
from moeify.data.examples import Options, open_data
from moeify.errors import OutputNotWritten, UsageError
from moeify.fitting import collect as collecting
from moeify.fitting import profile_file
from moeify.ir.profile import Profile
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.pipeline.default import FIND
from moeify.pipeline.runner import run


@dataclass(frozen=True)
class Settings:
    """How much is kept, and what is measured; see ``moeify.fitting.collect``."""

    samples: int = collecting.SAMPLES
    tokens: int = collecting.TOKENS
    top: int | None = None
    gradients: bool = False


@dataclass
class ProfileReport:
    """What was measured, block by block, for people and for --json."""

    model: str
    output: str
    profile: Profile
    paths: dict[str, str]  # of the blocks, by anchor
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def rows(self) -> list[dict[str, Any]]:
        """One per block. Shares are from 0 to 1; ``dead`` units were 0 in every row."""
        return [
            {
                "path": self.paths[anchor],
                "anchor": anchor,
                "tokens": block.tokens,
                "units": block.units,
                "active": float(block.active_F.mean()),
                "top_quarter": block.top_quarter,
                "dead": int((block.active_F == 0).sum()),
                "highest_firing": float(block.firing_F.max()),
            }
            for anchor, block in self.profile.blocks.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "output": self.output,
            "facts": dict(self.profile.facts),
            "top": self.profile.top,
            "batches": len(self.profile.batches),
            "blocks": self.rows(),
            "notes": self.notes,
            "seconds": self.seconds,
        }


def profile(
    model: nn.Module | str | Path,
    data: Any,
    *,
    inputs: Sequence[str] | Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None = None,
    tokenizer: str | Path | None = None,
    sequence: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    blocks: str = "all",
    include: tuple[str, ...] = (),
    samples: int = collecting.SAMPLES,
    tokens: int = collecting.TOKENS,
    top: int | None = None,
    gradients: bool = False,
    batch: int = Options.batch,
    seed: int = 0,
    output: str | Path | None = None,
) -> Profile:
    """What the hidden units of a dense model do on data, for ``moeify.convert(..., profile=...)``.

    ``model`` is a module or the path of a file or folder, which is not changed. ``data`` is the path of a text (with
    ``tokenizer``: a folder, a ``.gguf`` file or ``bytes``), of a folder of images or of tensors, a tuple or mapping of
    tensors whose rows are examples, or an iterable of batches. ``blocks`` and ``include`` are those of a Recipe;
    ``samples``, ``tokens``, ``top`` and ``gradients`` those of ``moeify.fitting.collect``. ``output`` writes the
    profile to a file too. Raises what reading the model and the data raise.
    """
    options = Options(str(tokenizer) if tokenizer else None, sequence, image_mean, image_std, batch, seed)
    if isinstance(model, nn.Module):
        program, place = frontend.capture(model, inputs), None
    elif inputs is not None and (isinstance(inputs, (Mapping, str)) or not all(isinstance(x, str) for x in inputs)):
        raise UsageError("the inputs of a model file are specs", hint='write "input_ids=int64[batch=2,seq=16]"')
    else:
        program, _ = captured(model, [str(text) for text in inputs or ()], None, (), Silent())
        place = Path(model)
    recipe = Recipe(blocks=blocks, include=include, seed=seed)
    made, _ = _profiled(program, recipe, data, options, Settings(samples, tokens, top, gradients), place, Silent())
    if output is not None:
        profile_file.write(made, Path(output))
    return made


def profile_to_file(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    options: Options,
    settings: Settings,
    recipe: Recipe,
    inputs: Sequence[str] = (),
    factory: str | None = None,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> ProfileReport:
    """``moeify profile``: read a model file, run it on data, write ``output``. Raises a MoeifyError of the cause."""
    started = time.perf_counter()
    progress = progress or Silent()
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise OutputNotWritten(f"cannot write {path}: {why}")
    program, notes = captured(model, inputs, factory, allow, progress)
    made, more = _profiled(program, recipe, data, options, settings, Path(model), progress)
    progress.stage(f"writing {path}")
    profile_file.write(made, path)
    paths = {block.anchor: block.path for block in program.blocks}
    notes = [*notes, *program.provenance.get("notes", []), *more]
    return ProfileReport(str(model), str(path), made, paths, notes, time.perf_counter() - started)


def _profiled(
    program: Program,
    recipe: Recipe,
    data: Any,
    options: Options,
    settings: Settings,
    model: Path | None,
    progress: Progress,
) -> tuple[Profile, tuple[str, ...]]:
    progress.stage("finding feed-forward blocks")
    program.recipe = recipe
    run(program, FIND)
    require_blocks(program)
    found = open_data(data, program, options, model)
    progress.stage("profiling the blocks")
    made = collecting.collect(
        program,
        found.batches,
        samples=settings.samples,
        top=settings.top,
        gradients=settings.gradients,
        tokens=settings.tokens,
        seed=options.seed,
        source=found.source,
        progress=progress,
    )
    return made, found.notes
