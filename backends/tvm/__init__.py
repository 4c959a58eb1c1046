"""TVM: a Program as Relax with kernels of our own, compiled to a library that runs without Python."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":  # imports tvm when it is used and not before
        from moeify.backends.tvm.loader import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
