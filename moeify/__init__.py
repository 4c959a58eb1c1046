"""moeify: dense PyTorch models into sparse Mixture-of-Experts models, with a proof.

Importing it registers the ``moe.*`` operators with torch, so that ``torch.export.load`` opens what moeify wrote;
everything else is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the ``moeify`` command: it starts without torch, and each subcommand imports its own."""
    return Path(sys.argv[0]).name in ("moeify", "moeify.exe") or ("-m", "moeify") in zip(
        sys.orig_argv, sys.orig_argv[1:]
    )


# A machine that only runs a compiled library (moeify.backends.tvm.load) may have no torch.
if not _is_command() and importlib.util.find_spec("torch") is not None:
    importlib.import_module("moeify.ir.ops")  # registers torch.ops.moeify

_EXPORTS = {
    "convert": "moeify.api.convert",
    "load": "moeify.api.load",
    "observe": "moeify.training.watch",
    "losses": "moeify.training.losses",
    "after_step": "moeify.training.steps",
    "routing": "moeify.training.recorder",
    "profile": "moeify.api.profile",
    "quality": "moeify.api.quality",
    "tune": "moeify.api.tune",
    "train": "moeify.api.train",
    "inspect_file": "moeify.api.inspect",
    "convert_file": "moeify.api.convert",
    "train_file": "moeify.api.train",
    "verify_files": "moeify.api.verify",
    "export_file": "moeify.api.export",
    "Profile": "moeify.ir.profile",
    "Recipe": "moeify.ir.recipe",
    "Report": "moeify.ir.report",
    "MoeifyError": "moeify.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'moeify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
