"""Which TVM this works with, and the clear error where it is another one or none."""

from __future__ import annotations

import importlib.metadata
import re

from moeify.errors import RuntimeUnavailable

PACKAGE = "apache-tvm"
NEEDS = "0.27"  # libraries, bytecode of the virtual machine and the Python API differ between minor versions
_HINT = "pip install 'moeify[tvm]'"


def require() -> str:
    """The version of TVM that is installed. tvm is not imported.

    Raises RuntimeUnavailable when there is none, or another minor version than the one that this was written for.
    """
    have = _installed()
    if minor(have) != minor(NEEDS):
        raise RuntimeUnavailable(f"the tvm backend needs {PACKAGE} {NEEDS} and this is {have}", hint=_HINT)
    return have


def require_for(needed: str, where: str) -> None:
    """That a library which was compiled with the version ``needed`` runs on the one that is installed.

    Raises RuntimeUnavailable with both versions.
    """
    have = _installed()
    if minor(have) != minor(needed):
        raise RuntimeUnavailable(
            f"this library was compiled with {PACKAGE} {needed} and {have} is installed",
            where=where,
            hint=f"pip install '{PACKAGE}=={needed}', or export the program again",
        )


def minor(version: str) -> tuple[int, ...]:
    """``0.27.0.post1`` -> (0, 27)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _installed() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeUnavailable(
            f"the tvm backend needs the package {PACKAGE}, which is not installed", hint=_HINT
        ) from None
