"""transformers' attention implementations: sdpa captures nearly everywhere, eager where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from moeify.errors import NotExportable
from moeify.frontend.hf_inputs import is_transformers

T = TypeVar("T")


def with_attention_fallback(module: nn.Module, capture: Callable[[], T], notes: list[str]) -> T:
    """``capture()``, and once more with eager attention when it fails and the module is a transformers model.

    The module's own choice is put back. Raises the first NotExportable when both fail.
    """
    try:
        return capture()
    except NotExportable as first:
        before = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if not is_transformers(module) or before in (None, "eager"):
            raise
        try:
            module.set_attn_implementation("eager")  # type: ignore[operator]
            result = capture()
        except NotExportable:
            raise first from None
        finally:
            module.set_attn_implementation(before)  # type: ignore[operator]
        notes.append(f"captured with eager attention: {before} does not export ({first.what})")
        return result
