"""Files of plots: whether one can be written, and writing it whole or not at all."""

from __future__ import annotations

import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.errors import BadOption, OutputNotWritten, RuntimeUnavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = (".png", ".svg")


def check(path: Path) -> None:
    """Whether a plot can be written there. Raises BadOption, OutputNotWritten, RuntimeUnavailable."""
    if path.suffix not in _KINDS:
        raise BadOption(
            f"cannot draw {path}: it does not end in .png or .svg", hint=f"write {path.with_suffix('.png')}"
        )
    if not path.absolute().parent.is_dir():
        raise OutputNotWritten(f"cannot write {path}: the folder {path.parent} does not exist")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeUnavailable("--plot needs matplotlib, which is not installed", hint="pip install matplotlib")


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Raises OutputNotWritten."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        figure.savefig(part, dpi=dpi)
        part.replace(path)
    except OSError as error:
        raise OutputNotWritten(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
