"""Checkpoints on disk: one folder per step, which is there whole or not at all.

    FOLDER/step-00000040/state.json                         the step and what the run was
    FOLDER/step-00000040/shard-00001-model-...safetensors   what rank 0 held, and so on

Ranks write into a folder with a name of its own; the first one renames it when all have finished.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeify.errors import OutputNotWritten, UnreadableFile

STATE = "state.json"
_SHARD = ".safetensors"
_FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class State:
    """What a checkpoint says of itself: steps done, the number of ranks that wrote it, and the run's own facts."""

    step: int
    ranks: int
    facts: dict[str, Any] = field(default_factory=dict)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def part_of(folder: Path, step: int) -> Path:
    """Where a checkpoint lies while it is written."""
    return folder / f".step-{step:08d}.part"


def steps(folder: Path) -> list[int]:
    """The steps of all complete checkpoints, in order; [] for a folder that does not exist."""
    if not folder.is_dir():
        return []
    found = [(match, entry) for entry in folder.iterdir() if (match := _STEP.fullmatch(entry.name))]
    return sorted(int(match[1]) for match, entry in found if (entry / STATE).is_file())


def latest(folder: str | Path) -> Path | None:
    """The last complete checkpoint of a folder, None where there is none."""
    folder = Path(folder)
    found = steps(folder)
    return path_of(folder, found[-1]) if found else None


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write into; what runs that were killed left behind goes. Raises OutputNotWritten."""
    part = part_of(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.part"):
            shutil.rmtree(left)
        part.mkdir()
    except OSError as error:
        raise _not_written(folder, error) from error
    return part


def finish(folder: Path, state: State, keep: int) -> Path:
    """Put the checkpoint in its place and remove all but the last ``keep``. Raises OutputNotWritten."""
    part, place = part_of(folder, state.step), path_of(folder, state.step)
    try:
        with (part / STATE).open("w") as file:
            sizes = {shard.name: shard.stat().st_size for shard in sorted(part.glob(f"*{_SHARD}"))}
            json.dump({"format": _FORMAT, **asdict(state), "files": sizes}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if place.exists():  # of a run that went on from an earlier step
            shutil.rmtree(place)
        os.replace(part, place)
        _sync(folder)
        for step in steps(folder)[:-keep]:
            shutil.rmtree(path_of(folder, step))
    except OSError as error:
        raise _not_written(folder, error) from error
    return place


def read_state(checkpoint: Path) -> State:
    """What a checkpoint says, with all its files there and whole. Raises UnreadableFile."""
    try:
        data = json.loads((checkpoint / STATE).read_text())
        if data["format"] != _FORMAT:
            raise UnreadableFile(
                f"{checkpoint} has format {data['format']!r} and this moeify reads format {_FORMAT}",
                hint="open it with the version that wrote it",
            )
        _check_files(checkpoint, data["files"])
        return State(int(data["step"]), int(data["ranks"]), dict(data["facts"]))
    except OSError as error:
        raise UnreadableFile(
            f"{checkpoint} is not a checkpoint: {STATE}: {(error.strerror or str(error)).lower()}",
            hint="give the folder of one step, such as step-00000040",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableFile(f"the {STATE} of {checkpoint} is damaged: {error}") from error


def _check_files(checkpoint: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        file = checkpoint / name
        have = file.stat().st_size if file.is_file() else None
        if have != size:
            what = "is missing" if have is None else f"has {have} bytes instead of {size}"
            raise UnreadableFile(
                f"the checkpoint {checkpoint} is damaged: {name} {what}",
                hint="go on from an earlier one, or copy it again, all of it",
            )


def _sync(folder: Path) -> None:
    """A rename outlives a power failure only when its folder has been written out."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_written(folder: Path, error: OSError) -> OutputNotWritten:
    return OutputNotWritten(
        f"cannot write a checkpoint to {folder}: {(error.strerror or str(error)).lower()}",
        hint="the earlier checkpoints are untouched; free space or choose another folder",
    )
