"""Compiling the native kernels: a C++17 compiler and nothing else. Standard library only, so that ``setup.py`` can load
this file before the package can be imported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).with_name("native")
LIBRARY = "libmoeify_kernels.so"
COMPILERS = ("c++", "g++", "clang++")
# No exceptions and no type information: nothing may be thrown through the runtime, which is C.
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti")
OPTIMIZED = ("-O3",)
# Each file is compiled for its own processors and is only entered where they are (native/processor.cc). GCC's own
# header of AVX-512 makes it warn of variables that are not set.
_X86_FLAGS = {
    "kernels_avx2.cc": ("-mavx2", "-mfma", "-mf16c"),
    "kernels_avx512.cc": ("-mavx512f", "-mavx2", "-mfma", "-mf16c", "-Wno-maybe-uninitialized"),
}
_X86 = ("x86_64", "amd64")


class CompileFailed(Exception):
    """The compiler's own message."""


def find_compiler() -> str | None:
    """What ``CXX`` names, else the first of ``COMPILERS`` that is on the path; None where there is none."""
    named = os.environ.get("CXX")
    return next((path for path in map(shutil.which, [named] if named else COMPILERS) if path), None)


def sources() -> list[Path]:
    return sorted(NATIVE.glob("*.cc"))


def digest() -> str:
    """Of everything that the library is made from, so that one made from other sources is not taken for it."""
    text = hashlib.sha256(repr((FLAGS, OPTIMIZED, _X86_FLAGS, platform.machine())).encode())
    for path in sorted([*NATIVE.glob("*.cc"), *NATIVE.glob("*.h")]):
        text.update(path.name.encode() + b"\0" + path.read_bytes())
    return text.hexdigest()[:16]


def compile_library(compiler: str, out: Path) -> None:
    """The library at ``out``, whole or not at all. Raises CompileFailed."""
    link(compiler, sources(), out, [*OPTIMIZED, f'-DMOEIFY_SOURCES="{digest()}"'], ["-shared"])


def link(compiler: str, files: Sequence[Path], out: Path, flags: Sequence[str], link_flags: Sequence[str]) -> None:
    """Compiles ``files``, each with its own machine flags, and links them into ``out``. Raises CompileFailed."""
    with tempfile.TemporaryDirectory(prefix="moeify-native-") as folder:

        def one(source: Path) -> str:
            target = Path(folder, f"{source.stem}.o")
            own = _X86_FLAGS.get(source.name, ()) if platform.machine().lower() in _X86 else ()
            _run([compiler, *FLAGS, *flags, *own, f"-I{NATIVE}", "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(one, files))
        whole = Path(folder, out.name)
        _run([compiler, *flags, *objects, *link_flags, "-o", str(whole)])
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".{out.name}.{os.getpid()}")  # a rename is atomic within one file system only
        shutil.copy2(whole, beside)
        os.replace(beside, out)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise CompileFailed(errors[0] if errors else f"{command[0]} ended with status {done.returncode}")
