"""The folder OUT/: a library, its weights, and what they are; written beside its place, then put there as a whole."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.backends.tvm import header as headers
from moeify.backends.tvm import loader, parameters
from moeify.backends.tvm.loader import HEADER, LIBRARY, PARAMETERS, Compiled
from moeify.backends.writing import reason
from moeify.errors import OutputNotWritten

if TYPE_CHECKING:
    from moeify.backends.tvm.weights import Weight

# Room for object files. LLVM ends the process when it cannot write one, so the disk is asked before.
_OBJECTS = 64 << 20
_OURS = frozenset({HEADER, LIBRARY, PARAMETERS})


class Stage:
    """A library that is being made in ``folder``, a temporary one beside ``path``. ``load(folder)`` opens it."""

    def __init__(self, path: Path, folder: Path, shown: Path) -> None:
        self.path, self.folder = path, folder
        self._shown = shown  # the path as it was given
        self._header: dict[str, Any] = {}

    def write(
        self,
        executable: Any,
        weights: Iterable[Weight],
        header: Mapping[str, Any],
        *,
        fcompile: Callable[..., None] | None = None,
    ) -> None:
        """Link a relax VMExecutable, compute and write the weights, and write ``header`` (see header.py).

        ``fcompile`` links, as ``linking.linker`` gives; None is TVM's own choice of a compiler on this machine.
        Raises OutputNotWritten, and BadHeader for a header that the loader would not take.
        """
        weights = list(weights)
        parsed = headers.parse(dict(header))
        assert list(parsed.weights) == [weight.name for weight in weights], "the header names other weights"
        work = self.folder / "work"  # object files: on the disk that was chosen, not on one that may be small
        work.mkdir()
        _reserve(self.folder / PARAMETERS, parameters.size(weights))
        _reserve(work / "room", _OBJECTS)
        (work / "room").unlink()
        try:
            executable.export_library(str(self.folder / LIBRARY), fcompile=fcompile, workspace_dir=str(work))
        except RuntimeError as error:  # of TVM: the linker's words
            raise _not_written(self.path, reason(error)) from error
        shutil.rmtree(work)
        parameters.write(self.folder / PARAMETERS, weights)
        self._header = dict(header)
        self._describe()

    def twin(self, executable: Any) -> Compiled:
        """Another relax VMExecutable, for this machine's CPU, with the weights that were written: for a library that
        does not run here.
        """
        header, _ = loader.read_header(self.folder)
        return Compiled(executable.jit(), self.folder, dataclasses.replace(header, device="cpu"))

    def finish(self, report: Mapping[str, Any]) -> list[Path]:
        """Add the report and put the folder at ``path``; gives its files. An older one goes after the new one is there.

        Raises OutputNotWritten; then what stood at ``path`` stands there still.
        """
        assert self._header, "write comes before finish"
        self._header["report"] = dict(report)
        self._describe()
        names = sorted(_OURS)
        for name in names:
            _sync(self.folder / name)
        _sync(self.folder)
        old = self.folder.with_suffix(".old")
        require_replaceable(self.path)  # minutes have passed
        moved = self.path.is_dir()
        if moved:
            os.rename(self.path, old)
        try:
            os.rename(self.folder, self.path)
        except BaseException:
            if moved and not self.path.exists():
                os.rename(old, self.path)
            raise
        _sync(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)
        return [self._shown / name for name in names]

    def _describe(self) -> None:
        (self.folder / HEADER).write_text(json.dumps(self._header, indent=1) + "\n", "utf-8")


@contextmanager
def staged(path: str | Path) -> Iterator[Stage]:
    """Nothing at ``path`` changes unless ``finish`` is called; the temporary folder goes in any case.

    Raises OutputNotWritten for what the operating system refuses and for a ``path`` that must not be replaced.
    """
    shown, path = Path(path), Path(os.path.abspath(path))
    require_replaceable(path)
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        folder.mkdir()
        yield Stage(path, folder, shown)
    except OSError as error:
        raise _not_written(path, reason(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_replaceable(path: Path) -> None:
    """That a library may be put at ``path``: there is nothing, an empty folder, or a library of ours and nothing else.

    Raises OutputNotWritten.
    """
    if not path.absolute().parent.is_dir():
        raise OutputNotWritten(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputNotWritten(
            f"cannot write {path}: it is {'a link' if path.is_symlink() else 'a file'}, not a folder"
        )
    if not path.is_dir():
        return
    try:
        names = {one.name for one in path.iterdir()}
    except OSError as error:
        raise _not_written(path, reason(error)) from error
    foreign = sorted(names - _OURS)
    if foreign or (names and HEADER not in names):
        what = f"it holds {foreign[0]}, " if foreign else f"it has no {HEADER}: files "
        raise OutputNotWritten(
            f"cannot write {path}: {what}which moeify did not write", hint="choose another folder, or empty this one"
        )


def _reserve(file: Path, size: int) -> None:
    """Take so much of the disk. Raises OSError when it is not there."""
    with file.open("wb") as opened:
        if size:
            os.posix_fallocate(opened.fileno(), 0, size)


def _not_written(path: Path, why: str) -> OutputNotWritten:
    return OutputNotWritten(
        f"cannot write {path}: {why}", hint="nothing was changed; free space or choose another --output"
    )


def _sync(path: Path) -> None:
    """To the disk: a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems sync no folders
            raise
    finally:
        os.close(handle)
