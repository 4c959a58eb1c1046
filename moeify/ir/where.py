"""Where a node comes from: the module path and the user's own source line, from the metadata of torch.export."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_LIBRARY = (str(Path(torch.__file__).parent),)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module the node was traced in, '' for the root.

    torch.export marks the second call of a shared module with a suffix ``@1``: it is taken off.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return re.sub(r"@\d+", "", next(reversed(stack.values()))[0]) if stack else ""


def common_path(paths: list[str]) -> str:
    """The deepest module path that holds all of them."""
    if not paths:
        return ""
    parts = [path.split(".") for path in paths]
    common = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def source_line(node: fx.Node) -> str | None:
    """``file:line`` of the innermost frame outside torch, or None."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line, _ in reversed(frames):
        if not file.startswith(_LIBRARY):
            return f"{file}:{line}"
    return None
