"""The recipe: what to make of which block. A frozen dataclass; TOML on disk; command-line flags on top."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.errors import BadRecipe, UnreadableFile

METHOD_DEFAULT = "copy"
ROUTER_DEFAULT = "softmax-topk"
# For methods that split a block: its parts add up with weight 1 each, and softmax-topk's weights sum to 1.
ROUTER_OF_SPLITS = "topk"
TOKENS = 32768  # rows of a block after which methods that learn from data have read enough
_SPLITS = re.compile(r"\s*(carve|split-)")


@dataclass(frozen=True)
class BlockRecipe:
    """What one block becomes. ``method`` and ``router`` are texts such as ``drop{ratio=0.25}`` (see
    ``moeify.registry``); no router means the one that goes with the method, see ``with_router``.
    """

    method: str = METHOD_DEFAULT
    experts: int = 8
    top_k: int = 2
    router: str = ""
    shared: int = 0  # shared experts, always on
    shared_gate: bool = False  # gate the shared experts by sigmoid(w x)
    repair: bool = True  # of methods that split, where there are data: fit the down projections to the dense output
    router_losses: tuple[str, ...] = ()  # what training adds to the model's loss, texts such as ``switch{weight=0.01}``

    def __post_init__(self) -> None:
        if isinstance(self.router_losses, list):  # as a file has it
            object.__setattr__(self, "router_losses", tuple(self.router_losses))
        if not isinstance(self.router_losses, tuple) or not all(isinstance(one, str) for one in self.router_losses):
            raise BadRecipe(f"router-losses is {self.router_losses!r}: it must be a list of texts")
        for name in ("experts", "top_k", "shared"):
            value, least = getattr(self, name), 0 if name == "shared" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BadRecipe(f"{_flag(name)} is {value!r}: it must be a whole number of at least {least}")
        for name in ("method", "router"):
            _check_type(name, getattr(self, name), str, "a text")
        for name in ("shared_gate", "repair"):
            _check_type(name, getattr(self, name), bool, "true or false")
        if self.top_k > self.experts:
            raise BadRecipe(
                f"top-k {self.top_k} is larger than the number of experts, {self.experts}",
                hint=f"choose --top-k between 1 and {self.experts}",
            )
        if self.shared_gate and not self.shared:
            raise BadRecipe("shared-gate gates the shared experts, and there are none", hint="add --shared 1")

    def with_router(self) -> BlockRecipe:
        """The same recipe naming its router: where it names none, ``topk`` for a split, else ``softmax-topk``."""
        if self.router:
            return self
        return dataclasses.replace(self, router=ROUTER_OF_SPLITS if _SPLITS.match(self.method) else ROUTER_DEFAULT)


@dataclass(frozen=True)
class Recipe(BlockRecipe):
    """A BlockRecipe for all blocks, which blocks, the seed, and overrides by glob over block paths (later ones win).

    ``blocks`` is ``all``, ``every:N``, ``first:N``, ``last:N`` or a comma-separated list of globs over module paths.
    ``include`` names kinds of blocks that are left alone by default: ``sample`` (one row per example), ``channel``
    (token-mixing). Methods that learn from data read them until a block has seen ``tokens`` rows.
    """

    blocks: str = "all"
    include: tuple[str, ...] = ()
    seed: int = 0
    tokens: int = TOKENS
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_type("blocks", self.blocks, str, "a text")
        _check_type("seed", self.seed, int, "a whole number")
        _check_type("tokens", self.tokens, int, "a whole number")
        kinds = self.include if isinstance(self.include, (tuple, list)) else (None,)
        if not all(isinstance(kind, str) for kind in kinds):
            raise BadRecipe(f"include is {self.include!r}: it must be a list of texts")
        for glob, fields in self.overrides:
            _check_type("blocks of an override", glob, str, "a text")
            _check_names(fields, _block_fields(), f"override {glob!r}")
            self._with(fields)

    def for_block(self, path: str) -> BlockRecipe:
        """The recipe of the block at a module path, its router named."""
        merged: dict[str, Any] = {}
        for glob, fields in self.overrides:
            if fnmatch.fnmatchcase(path, glob):
                merged.update(fields)
        return self._with(merged).with_router()

    def _with(self, fields: Mapping[str, Any]) -> BlockRecipe:
        base = {name: getattr(self, name) for name in _block_fields()}
        return BlockRecipe(**{**base, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``Recipe.from_dict`` reads it back."""
        data = dataclasses.asdict(self)
        data["include"], data["router_losses"] = list(self.include), list(self.router_losses)
        data["overrides"] = [{"blocks": glob, **fields} for glob, fields in self.overrides]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Raises BadRecipe for keys that do not exist."""
        data = dict(data)
        overrides = data.pop("overrides", None) or data.pop("override", None) or []
        _check_names(data, {f.name for f in dataclasses.fields(cls)}, "recipe")
        if not isinstance(overrides, list) or not all(isinstance(entry, Mapping) for entry in overrides):
            raise BadRecipe(f"override is {overrides!r}: it must be a list of tables", hint="write [[override]]")
        split = []
        for entry in overrides:
            entry = {key.replace("-", "_"): value for key, value in entry.items()}
            if "blocks" not in entry:
                raise BadRecipe("an override does not say which blocks", hint='add blocks = "encoder.layer.*"')
            split.append((entry.pop("blocks"), entry))
        if isinstance(data.get("include"), list):
            data["include"] = tuple(data["include"])
        return cls(**data, overrides=tuple(split))

    def to_toml(self) -> str:
        """The text of a recipe file; ``Recipe.from_toml`` reads it back. What has its default value is left out."""
        lines = [
            f"{field.name} = {json.dumps(getattr(self, field.name), ensure_ascii=False)}"
            for field in dataclasses.fields(self)
            if field.name != "overrides" and getattr(self, field.name) != field.default
        ]
        for glob, fields in self.overrides:
            lines += ["", "[[override]]", f"blocks = {json.dumps(glob, ensure_ascii=False)}"]
            lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe file: the fields at top level, ``[[override]]`` tables with ``blocks = "glob"``; a table
        ``[train]`` is for ``moeify train``."""
        try:
            data = tomllib.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UnreadableFile(f"cannot read the recipe {path}: {error}") from error
        data.pop("train", None)  # how the model is trained then, which api.train_options reads
        return cls.from_dict({key.replace("-", "_"): value for key, value in data.items()})


def _block_fields() -> set[str]:
    return {f.name for f in dataclasses.fields(BlockRecipe)}


def _check_names(data: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise BadRecipe(f"the {where} has no field {unknown[0]!r}", hint=f"its fields: {', '.join(sorted(known))}")


def _check_type(name: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRecipe(f"{_flag(name)} is {value!r}: it must be {what}")


def _flag(name: str) -> str:
    return name.replace("_", "-")
