"""Why torch.export failed, in one or two lines, with the user's own line."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

from moeify.errors import NotExportable

_OURS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_DATA_DEPENDENT = (
    "a Python decision (if, while, int(), list()) depends on the values of a tensor, and a graph cannot take it"
)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def not_exportable(module: nn.Module, error: Exception) -> NotExportable:
    """The error to raise for a failure of torch.export."""
    text = str(error).strip()
    reason, hint = _explain(type(error).__name__, text)
    return NotExportable(
        f"torch.export cannot capture {type(module).__name__}: {reason}", where=user_line(error), hint=hint
    )


def _explain(kind: str, text: str) -> tuple[str, str]:
    lower = text.lower()
    if "data-dependent" in lower or "datadependent" in kind.lower() or "unbacked symint" in lower:
        return (
            _DATA_DEPENDENT,
            "write it with torch.where, torch.clamp or masks, or take the branch out of forward",
        )
    if "constraints violated" in lower or "specialized" in lower:
        return _first_lines(text), "fix the sizes: write --input with bare numbers, or pass fixed=True"
    if ("fake" in lower and "numpy" in lower) or ".numpy()" in lower:
        return _first_lines(text), "keep the computation in torch: forward turns a tensor into a numpy array"
    return f"{kind}: {_first_lines(text)}", "does the model run on these inputs? give others with --input"


def _first_lines(text: str, limit: int = 200) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else "no reason given"
    return first if len(first) <= limit else first[: limit - 3] + "..."


def user_line(error: BaseException) -> str | None:
    """``file:line`` of the innermost frame that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith((_TORCH, _OURS, "<")) and "importlib" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}"
    return None
