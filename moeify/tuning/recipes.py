"""The recipe of an allocation."""

from __future__ import annotations

import dataclasses
import glob
from collections import Counter
from collections.abc import Mapping
from typing import Any

from moeify.ir.recipe import Recipe
from moeify.tuning.choices import Choice

METHOD = "split-energy"


def recipe_of(base: Recipe, choices: Mapping[str, Choice], tokens: int) -> Recipe:
    """``base`` (its seed and the kinds it includes) with a choice for each block path; dense ones are not selected.

    The most frequent choice stands for all blocks and the others are overrides. ``tokens`` are those of the data that
    are fitted to. At least one choice is not dense.
    """
    split = {path: _fields(choice) for path, choice in choices.items() if not choice.dense}
    usual, _ = Counter(tuple(fields.items()) for fields in split.values()).most_common(1)[0]
    overrides = tuple((glob.escape(path), fields) for path, fields in split.items() if tuple(fields.items()) != usual)
    return dataclasses.replace(
        base,
        method=METHOD,
        blocks=",".join(glob.escape(path) for path in split),
        tokens=tokens,
        overrides=overrides,
        **dict(usual),
    )


def _fields(choice: Choice) -> dict[str, Any]:
    return {"experts": choice.experts, "top_k": choice.top_k, "shared": choice.shared}
