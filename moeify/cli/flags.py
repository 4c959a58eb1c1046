"""From recipe flags to a Recipe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from moeify.errors import BadOption
from moeify.ir.recipe import BlockRecipe, Recipe

_SET = "write --set 'encoder.layer.0*:experts=4,top-k=1'"


def recipe(file: Path | None, overrides: Sequence[str], include: Sequence[str], **flags: Any) -> Recipe:
    """The file's recipe with the flags that were given in its place; --set goes after its overrides.

    Raises BadOption for a --set that does not parse and whatever Recipe raises.
    """
    base = Recipe.from_toml(file) if file else Recipe()
    given = {name: value for name, value in flags.items() if value is not None}
    if include:
        given["include"] = tuple(include)
    if overrides:
        given["overrides"] = base.overrides + tuple(override(text) for text in overrides)
    return dataclasses.replace(base, **given)


def numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    """``0.485,0.456,0.406``. Raises BadOption."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadOption(f"cannot read {flag} {text!r}", hint=f"write {flag} 0.5 or {flag} 0.5,0.5,0.5") from None


def override(text: str) -> tuple[str, dict[str, Any]]:
    """``GLOB:field=value,field=value``; commas inside braces belong to the value, ``+`` is between router losses."""
    glob, colon, fields = text.partition(":")
    if not (glob and colon and fields):
        raise BadOption(f"cannot read --set {text!r}", hint=_SET)
    return glob.strip(), dict(_field(item, text) for item in re.split(r",(?![^{]*\})", fields))


def _field(item: str, text: str) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in item.partition("="))
    name = name.replace("-", "_")
    kinds = get_type_hints(BlockRecipe)
    if name not in kinds:
        known = ", ".join(sorted(kind.replace("_", "-") for kind in kinds))
        raise BadOption(f"--set {text!r} names a field that does not exist: {name!r}", hint=f"its fields: {known}")
    if not equals and kinds[name] is bool:
        return name, True
    if name == "router_losses":
        return name, tuple(part.strip() for part in re.split(r"\+(?![^{]*\})", value) if part.strip())
    try:
        return name, _truth(value) if kinds[name] is bool else kinds[name](value)
    except (KeyError, ValueError):
        wanted = {int: "a whole number", bool: "true or false"}.get(kinds[name], "a value")
        raise BadOption(
            f"--set {text!r} wants {wanted} for {name.replace('_', '-')}, not {value!r}", hint=_SET
        ) from None


def _truth(text: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
