"""Reading ``.pt2`` archives without executing what they hold."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from moeify.errors import UnreadableFile, UnsafePickle
from moeify.frontend.pt2_scan import check_archive
from moeify.frontend.reasons import first_line
from moeify.frontend.sniff import PT2, sniff

_WEIGHTS_ONLY = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None}


def read_pt2(path: str | Path, *, extra: Sequence[str] = ()) -> tuple[ExportedProgram, dict[str, str]]:
    """The exported program and the extra files of those names ('' for absent ones).

    Raises UnreadableFile, or UnsafePickle for an archive with anything in it that could run.
    """
    path = Path(path)
    if sniff(path) != PT2:
        raise UnreadableFile(f"{path} is not a torch.export archive", hint="give a .pt2 file")
    check_archive(path)
    extras = dict.fromkeys(extra, "")
    try:
        with _weights_only(), _quiet(), path.open("rb") as file:
            exported = torch.export.load(file, extra_files=extras)
    except Exception as error:  # torch.export.load raises whatever it meets
        text = str(error)
        if "weights_only" in text or "Weights only" in text:
            raise UnsafePickle(
                f"{path} holds a pickle with more than tensors in it; nothing was executed",
                hint="save it again with torch.export.save and plain tensors as example inputs",
            ) from error
        raise UnreadableFile(f"torch.export cannot load {path}: {first_line(error)}") from error
    exported._guards_code = []  # Python source from the file, which module() would run
    return exported, {name: extras.get(name) or "" for name in extra}


def holds_metadata(path: str | Path, name: str) -> bool:
    """Whether the file is a zip archive with an extra file of that name. Reads the table of contents only."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.partition("/")[2] == f"extra/{name}" for entry in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError):
        return False


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load falls back to unsafe unpickling inside torch.export.load; torch reads these variables at each call."""
    before = {name: os.environ.get(name) for name in _WEIGHTS_ONLY}
    try:
        _set_environment(_WEIGHTS_ONLY)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export.load logs what it then raises, and warns about read-only buffers."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
