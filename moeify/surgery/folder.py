"""Writing a folder so that it changes as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeify.errors import OutputNotWritten
from moeify.surgery.layout import MARKER


@contextmanager
def writing(target: Path, owned: Callable[[str], bool], *, beside_others: bool = False) -> Iterator[Path]:
    """Gives an empty temporary folder next to ``target``; on success its files replace the ``owned`` ones of the
    target.

    ``owned`` says by file name what a former save may have left. Without ``beside_others`` a target that is neither
    empty nor one of ours is refused. All writing happens in the temporary folder; what follows is renames, undone
    when one fails, Ctrl-C included. Raises OutputNotWritten; then the target is as it was.
    """
    target = Path(os.path.abspath(target))
    _check(target, beside_others)
    token = secrets.token_hex(4)
    fresh = target.with_name(f".{target.name}.{token}.new")
    old = target.with_name(f".{target.name}.{token}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        _swap(fresh, target, old, owned)
    except OSError as error:
        raise not_written(target, (error.strerror or str(error)).lower()) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def not_written(target: Path, reason: str) -> OutputNotWritten:
    return OutputNotWritten(
        f"cannot write the checkpoint folder {target}: {reason}",
        hint="nothing was changed; free space or choose another folder",
    )


def _check(target: Path, beside_others: bool) -> None:
    if target.is_file():
        raise OutputNotWritten(f"{target} is a file, not a folder", hint="choose another folder")
    foreign = target.is_dir() and any(target.iterdir()) and not (target / MARKER).exists()
    if foreign and not beside_others:
        raise OutputNotWritten(
            f"the folder {target} holds files that moeify did not write",
            hint="choose another folder, or empty this one yourself",
        )


def _swap(fresh: Path, target: Path, old: Path, owned: Callable[[str], bool]) -> None:
    made = not target.exists()
    target.mkdir(exist_ok=True)
    old.mkdir()
    moves: list[tuple[Path, Path]] = []
    try:
        for file in sorted(target.iterdir()):
            if file.is_file() and owned(file.name):
                _move(file, old / file.name, moves)
        # The marker last: a folder with it is complete.
        for file in sorted(fresh.iterdir(), key=lambda file: (file.name == MARKER, file.name)):
            _move(file, target / file.name, moves)
    except BaseException:
        for source, moved in reversed(moves):
            if moved.exists():
                os.replace(moved, source)
        if made:
            target.rmdir()
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move(source: Path, to: Path, moves: list[tuple[Path, Path]]) -> None:
    moves.append((source, to))  # noted first: an interrupt may come between the two lines
    os.replace(source, to)
