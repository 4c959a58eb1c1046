"""Importing a module that the user named."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType


def user_module(path: str) -> ModuleType:
    """Import a module by its path; the current folder is looked in last. Raises what the import raises."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(path)
