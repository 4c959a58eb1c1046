"""Linking what TVM compiled into a shared library, for this machine or another."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moeify.errors import RuntimeUnavailable

if TYPE_CHECKING:
    from moeify.backends.tvm.machine import Machine

Link = Callable[..., None]
_TELLING = ("error", "undefined", "no space", "cannot")
_SHARED = ("-shared", "-fPIC")


def linker(machine: Machine) -> Link:
    """What ``export_library`` calls with the name of the library and its object files, which need no C library.

    For the architecture of this machine ``CXX``, ``CC`` or a compiler that is found; for another a compiler of that
    name (``aarch64-linux-gnu-g++``), else lld, else zig. Raises RuntimeUnavailable where there is none.
    """
    from tvm.target import codegen

    target = machine.target.host or machine.target
    triple = str(target.attrs["mtriple"])
    kind = triple.split("-")[0]
    native = kind == str(codegen.llvm_get_system_triple()).split("-")[0]
    command = _native() if native else _cross(triple, kind)
    if command is None:
        raise RuntimeUnavailable(
            f"linking a library for {triple} needs a compiler, and none was found",
            hint="apt-get install g++" if native else "pip install ziglang, or apt-get install lld",
        )

    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **_: Any) -> None:
        words = [*command, "-o", output, *objects, *(options or ())]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise OSError(f"{command[0]} fails: {_line(done.stderr) or done.returncode}")

    link.output_format = "so"  # type: ignore[attr-defined]
    return link


def _native() -> list[str] | None:
    chosen = os.environ.get("CXX") or os.environ.get("CC")
    if chosen:
        return [*shlex.split(chosen), *_SHARED]
    for name in ("g++", "gcc", "clang++", "clang", "c++", "cc"):
        if path := shutil.which(name):
            return [path, *_SHARED]
    return None


def _cross(triple: str, kind: str) -> list[str] | None:
    for name in (f"{triple}-g++", f"{triple}-gcc", f"{kind}-linux-gnu-g++", f"{kind}-linux-gnu-gcc"):
        if path := shutil.which(name):
            return [path, *_SHARED]
    if path := shutil.which("ld.lld"):
        return [path, "-shared"]
    zig = [path] if (path := shutil.which("zig")) else [sys.executable, "-m", "ziglang"]
    if len(zig) == 1 or importlib.util.find_spec("ziglang"):
        return [*zig, "cc", f"--target={kind}-linux-gnu", "-nostdlib", *_SHARED]
    return None


def _line(text: str) -> str:
    """The line that says why, of what a compiler printed."""
    lines = text.strip().splitlines()
    telling = [line for line in lines if any(word in line.lower() for word in _TELLING)]
    return (telling or lines or [""])[0]
