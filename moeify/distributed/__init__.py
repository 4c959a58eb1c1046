"""Expert parallelism: running a sharded program on many ranks, and planning for it."""

from __future__ import annotations

import importlib
from typing import Any

# Loaded when asked for: planning needs no process group.
_TABLE = {
    "bind": "binding",
    "unbind": "binding",
    "sync_gradients": "gradients",
    "gradient_norm": "gradients",
    "clip_gradients": "gradients",
    "fully_shard": "fsdp",
    "run_ranks": "threads",
    "save": "checkpoint",
    "load": "checkpoint",
    "latest": "checkpoint_folder",
    "consolidate": "checkpoint_whole",
    "load_program": "checkpoint_whole",
}

__all__ = sorted(_TABLE)


def __getattr__(name: str) -> Any:
    if name in _TABLE:
        return getattr(importlib.import_module(f"{__name__}.{_TABLE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
