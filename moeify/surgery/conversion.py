"""What a converted model knows about its own conversion: enough to write a checkpoint of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moeify.errors import UsageError
from moeify.ir.block import Block
from moeify.ir.recipe import Recipe

ATTRIBUTE = "moeify_conversion"
REPORT = "moeify_report"  # where moeify.convert leaves its Report on the model


@dataclass
class Conversion:
    """Kept on the root module. ``token_ids_of``: by anchor, the path of the embedding whose input the router reads."""

    recipe: Recipe
    blocks: list[Block]
    token_ids_of: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    factory: str | None = None


def conversion_of(model: nn.Module) -> Conversion:
    """Raises UsageError for a model that ``apply`` has not converted."""
    found = getattr(model, ATTRIBUTE, None)
    if not isinstance(found, Conversion):
        raise UsageError(
            f"this {type(model).__name__} has not been converted",
            hint="pass the model that moeify.convert returned, not a part of it",
        )
    return found
