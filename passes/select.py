"""Which blocks become mixtures."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import ClassVar

from moeify.errors import BadRecipe, NoBlocks
from moeify.ir.block import Block
from moeify.ir.program import Program
from moeify.pipeline.base import Log, Pass

_KINDS = ("sample", "channel")
_SHOWN = 12


@dataclass(frozen=True)
class Select(Pass):
    """Mark the blocks that the recipe names.

    Before:  program.blocks = [block, ...]
    After:   program.selected = {block.anchor: True or False, ...}

    ``all``; ``every:N``, the Nth, 2Nth, ... block as in models that have a mixture in every Nth layer;
    ``first:N``; ``last:N``; or comma-separated globs over module paths. A block that find-ffn gave a reason
    against is no candidate, unless its kind of rows is included. It is an error when a part of the selection
    selects nothing, or an override is for no block.
    """

    name: ClassVar[str] = "select"

    def apply(self, program: Program, log: Log) -> None:
        recipe = program.recipe
        for kind in recipe.include:
            if kind not in _KINDS:
                raise BadRecipe(f"include names {kind!r}", hint=f"choose among {', '.join(_KINDS)}")
        for glob, _ in recipe.overrides:
            if program.blocks and not any(fnmatch.fnmatchcase(block.path, glob) for block in program.blocks):
                raise NoBlocks(f"the override {glob!r} matches no block", hint=_paths(program.blocks))
        candidates = [b for b in program.blocks if b.reason is None or b.rows in recipe.include]
        chosen = {id(block) for block in _choose(recipe.blocks, candidates, program.blocks)} if candidates else set()
        program.selected = {block.anchor: id(block) in chosen for block in program.blocks}
        for block in program.blocks:
            if id(block) not in chosen:
                log(f"{block.path}: {block.reason or f'not among {recipe.blocks}'}")
        log(f"{len(chosen)} of {len(program.blocks)} blocks selected by {recipe.blocks}")


def _choose(text: str, candidates: list[Block], found: list[Block]) -> list[Block]:
    if text == "all":
        return candidates
    counted = re.fullmatch(r"(every|first|last):(.*)", text)
    if counted is None:
        return _by_globs(text, candidates, found)
    word, number = counted[1], counted[2].strip()
    if not number.isdecimal() or int(number) == 0:
        raise BadRecipe(f"blocks is {text!r}: {word}: wants a whole number of at least 1", hint=f"write {word}:2")
    n = int(number)
    if n > len(candidates):
        raise NoBlocks(f"{text} asks for more blocks than there are, {len(candidates)}", hint=_paths(candidates))
    return {"every": candidates[n - 1 :: n], "first": candidates[:n], "last": candidates[-n:]}[word]


def _by_globs(text: str, candidates: list[Block], found: list[Block]) -> list[Block]:
    globs = [glob.strip() for glob in text.split(",")]
    for glob in globs:
        if any(fnmatch.fnmatchcase(block.path, glob) for block in candidates):
            continue
        for block in found:
            if fnmatch.fnmatchcase(block.path, glob):
                raise NoBlocks(
                    f"{glob!r} matches no block that may be rewritten: {block.reason}",
                    where=block.path,
                    hint=f"--include {block.rows} selects it nevertheless" if block.rows in _KINDS else None,
                )
        raise NoBlocks(f"{glob!r} matches no block", hint=_paths(candidates))
    return [block for block in candidates if any(fnmatch.fnmatchcase(block.path, glob) for glob in globs)]


def _paths(blocks: list[Block]) -> str:
    shown = ", ".join(block.path or "(the model)" for block in blocks[:_SHOWN])
    return f"the blocks are {shown}" + (f" and {len(blocks) - _SHOWN} more" if len(blocks) > _SHOWN else "")
