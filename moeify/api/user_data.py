"""The user's data in a conversion: a profile of the blocks, and inputs to verify on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeify.api.progress import Progress
from moeify.data import tensors as data_files
from moeify.data import text
from moeify.data.examples import Options, open_data
from moeify.errors import BadInputSpec, UnreadableFile, UsageError
from moeify.experts import METHODS
from moeify.experts.planning import require_profile
from moeify.fitting import collect as collecting
from moeify.fitting import profile_file
from moeify.ir.profile import Profile
from moeify.ir.program import Program

_ALWAYS = ("batch", "seed")  # options that have a value when nobody gave one


@dataclass(frozen=True)
class UserData:
    """What the user gave. ``data`` is anything ``open_data`` reads, ``profile`` a Profile or the path of one."""

    data: Any = None
    profile: Profile | str | Path | None = None
    options: Options = field(default_factory=Options)

    def check(self) -> None:
        """What can be seen before a model is read. Raises UnreadableFile, or UsageError for options without data."""
        if isinstance(self.data, (str, Path)) and not Path(self.data).exists():
            raise UnreadableFile(f"there is no file or folder {self.data}")
        if self.profile is not None and not isinstance(self.profile, Profile) and not Path(self.profile).is_file():
            profile_file.read(Path(self.profile))  # says so
        unused = [name for name, value in vars(self.options).items() if value is not None and name not in _ALWAYS]
        if unused and self.data is None:
            flag = unused[0].replace("_", "-")
            raise UsageError(f"--{flag} says how data are read, and there are none", hint="give them with --data")

    def prepare(self, program: Program, progress: Progress, model: Path | None = None) -> tuple[torch.Tensor, ...]:
        """Set ``program.profile`` where there are data and a method that splits, and return inputs to verify on.

        The program has been through find-ffn and select. Tensors in a file or a tuple are one batch, unless a profile
        is made of them; otherwise the first batch is what is verified on, and without data the profile's own, or the
        example. Raises Refused for a method that needs a profile when there is none, and what reading the data raises.
        """
        made = self._profile(program)
        if self.data is None:
            batch = made.batches[0] if made is not None and made.batches else program.example
        elif made is None and _splits(program):
            made = self._collect(program, progress, model)
            batch = made.batches[0]
        elif self._is_one_batch():
            batch = self._whole(program)
        else:
            batch = self._first(program, model)
        program.profile = made
        if made is not None:
            _note(program, f"hidden units profiled on {made.facts['source']}: {made.facts['tokens']} tokens")
        require_profile(program)
        return batch

    def _profile(self, program: Program) -> Profile | None:
        if self.profile is None:
            return None
        if isinstance(self.profile, Profile):
            made, source = self.profile, "the profile"
        else:
            made, source = profile_file.read(Path(self.profile)), str(self.profile)
        profile_file.check(made, program, source)
        return made

    def _collect(self, program: Program, progress: Progress, model: Path | None) -> Profile:
        found = open_data(self.data, program, self.options, model)
        _note(program, *found.notes)
        progress.stage("profiling the blocks")
        return collecting.collect(
            program,
            found.batches,
            gradients=_needs_gradients(program),
            tokens=program.recipe.tokens,
            seed=program.recipe.seed,
            source=found.source,
            progress=progress,
        )

    def _first(self, program: Program, model: Path | None) -> tuple[torch.Tensor, ...]:
        found = open_data(self.data, program, self.options, model)
        _note(program, *found.notes)
        batch = next(iter(found.batches), None)
        if batch is None:
            raise BadInputSpec(f"{found.source}: there is no batch in it")
        return batch

    def _is_one_batch(self) -> bool:
        if isinstance(self.data, (str, Path)):
            path = Path(self.data)
            return not path.is_dir() and path.suffix.lower() not in text.SUFFIXES
        return isinstance(self.data, (tuple, Mapping))

    def _whole(self, program: Program) -> tuple[torch.Tensor, ...]:
        if isinstance(self.data, (str, Path)):
            return data_files.read(self.data, program.inputs)
        return data_files.fit(self.data, program.inputs, "data")


def _splits(program: Program) -> bool:
    return any(METHODS.parse(program.recipe.for_block(block.path).method).splits for block in program.converted())


def _needs_gradients(program: Program) -> bool:
    recipes = [program.recipe.for_block(block.path) for block in program.converted()]
    return any(METHODS.parse(recipe.method).needs_gradients for recipe in recipes)


def _note(program: Program, *notes: str) -> None:
    program.provenance["notes"] = [*program.provenance.get("notes", []), *notes]
