"""The native kernel library in a session: whether a model needs it, whether it is here, and what runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.backends.onnxruntime import kernel_build
from moeify.backends.onnxruntime.kernel_names import DOMAIN, VERSION
from moeify.backends.onnxruntime.model_header import Header
from moeify.errors import RuntimeUnavailable

_NO_VECTORS = "portable"  # kernel_build.isa of a CPU without the instructions that the kernels are written for


@dataclass(frozen=True)
class Kernels:
    """What computes a model's fused blocks: the ``library`` with the instructions ``isa``, or without one (None) the
    standard operators that the file carries, and ``why``. ``str()`` says it in a few words.
    """

    library: Path | None
    isa: str = ""
    why: str = ""

    def __str__(self) -> str:
        if self.library is None:
            return f"standard operators, not the fused kernel: {self.why}"
        if self.isa == _NO_VECTORS:
            return "the fused kernel in portable C++, which is slower: this CPU has no AVX2"
        return f"the fused kernel ({self.isa})"


def kernels(header: Header, wanted: bool) -> Kernels | None:
    """What will compute the fused blocks of a model, None when it has none.

    Raises RuntimeUnavailable for a model of another version of the operator: its weights may lie in another order.
    """
    version = header.opsets.get(DOMAIN)
    if version is None:
        return None
    if version != VERSION:
        raise RuntimeUnavailable(
            f"the model needs version {version} of {DOMAIN}, and this moeify has version {VERSION}",
            hint="export it again with this moeify, or run it with the moeify that wrote it",
        )
    if not wanted:
        return Kernels(None, why="the session was told not to load it")
    return here()


def is_built() -> bool:
    """Whether an export may count on the library: it is taken to run on a machine like this one."""
    return kernel_build.library() is not None


def here() -> Kernels:
    """What a session of a model with fused blocks will run on this machine."""
    library = kernel_build.library()
    if library is None:
        return Kernels(None, why=kernel_build.reason())
    return Kernels(library, isa=kernel_build.isa())


def register(settings: Any, library: Path) -> None:
    """Into an onnxruntime.SessionOptions. Raises RuntimeUnavailable for a library that this runtime cannot load."""
    try:
        settings.register_custom_ops_library(str(library))
    except Exception as error:  # the runtime has an exception of its own for every status
        import onnxruntime

        text = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeUnavailable(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the kernel library: {text[0]}",
            where=str(library),
            hint="'moeify build-kernels' makes one for this machine; Session(..., use_kernels=False) does without",
        ) from error
