"""The library of native kernels: where it is, and making it.

It is made when the package is installed and a C++ compiler is there, or later by ``build``. Without it everything
works; exported files then run their own standard operators in its place.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from moeify.backends.onnxruntime.kernel_compile import (
    COMPILERS,
    LIBRARY,
    NATIVE,
    CompileFailed,
    compile_library,
    digest,
    find_compiler,
)
from moeify.errors import RuntimeUnavailable


def library() -> Path | None:
    """The library made from this package's sources, in the package or in the user's cache. Compiles nothing."""
    return next((path for path in (NATIVE / LIBRARY, _cached()) if path.is_file() and _sources(path) == digest()), None)


def build() -> Path:
    """``library()``, compiled into the user's cache if there is none: about ten seconds.

    Raises RuntimeUnavailable where there is no compiler, or it fails.
    """
    existing = library()
    if existing is not None:
        return existing
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeUnavailable(reason(), hint="install g++ or clang++, or name a compiler in CXX")
    try:
        compile_library(compiler, _cached())
    except (CompileFailed, OSError) as error:
        raise RuntimeUnavailable(
            f"the native kernels do not compile: {error}", where=compiler, hint="the kernels need GCC 9 or Clang 10"
        ) from error
    return _cached()


def reason() -> str:
    """Why ``library()`` is None, in one line."""
    if find_compiler() is None:
        return f"the native kernels are not built, and there is no C++ compiler ({', '.join(COMPILERS)})"
    return "the native kernels are not built"


def compiler() -> str | None:
    """The compiler that ``build`` uses; None where there is none."""
    return find_compiler()


def isa() -> str:
    """The instructions that the kernels of ``library()`` use on this processor: avx512, avx2, neon or portable.

    portable is for processors without any of them, and several times slower. Raises RuntimeUnavailable without a
    library.
    """
    path = library()
    if path is None:
        raise RuntimeUnavailable(reason(), hint="moeify build-kernels")
    return _string(path, "moeify_isa")


def _cached() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "moeify", f"kernels-{digest()}", LIBRARY)


def _sources(path: Path) -> str:
    try:
        return _string(path, "moeify_sources")
    except (OSError, AttributeError):  # of another system, or damaged
        return ""


@functools.cache
def _string(path: Path, function: str) -> str:
    call = getattr(ctypes.CDLL(str(path)), function)
    call.restype = ctypes.c_char_p
    return call().decode()
