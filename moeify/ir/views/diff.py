"""Before and after, layer by layer, the same change shown once."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass

from moeify.ir.printer import Printer
from moeify.ir.program import Program
from moeify.ir.views.folding import local_lines, program_layers
from moeify.ir.views.labels import group_paths, label

_CONTEXT = 2  # unchanged lines shown around a change


@dataclass(frozen=True)
class Change:
    """One change that ``count`` layers share. ``lines`` start with '+', '-', ' ' or '@'."""

    label: str
    count: int
    lines: tuple[str, ...]


def diff(before: Program, after: Program) -> list[Change]:
    """The layers whose text differs, in order; layers are matched by module path and call."""
    old, new = _texts(before), _texts(after)
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for key in _in_order(list(old), list(new)):
        texts = old.get(key, ()), new.get(key, ())
        if texts[0] != texts[1]:
            alike.setdefault(texts, []).append(key[0])
    changes = []
    for texts, paths in alike.items():
        lines = tuple(_unified(*texts))
        for group in group_paths(paths):
            members = [paths[i] for i in group]
            changes.append(Change(label(members) or "(model)", len(members), lines))
    return changes


def _texts(program: Program) -> dict[tuple[str, int], tuple[str, ...]]:
    """(path, call) -> text of the layer."""
    printer = Printer(program.graph_module, program.inputs)
    calls: Counter[str] = Counter()
    texts: dict[tuple[str, int], tuple[str, ...]] = {}
    for layer in program_layers(program):
        texts[layer.path, calls[layer.path]] = local_lines(printer, layer)
        calls[layer.path] += 1
    return texts


def _in_order(old: list[tuple[str, int]], new: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return list(dict.fromkeys(old + new))


def _unified(old: tuple[str, ...], new: tuple[str, ...]) -> list[str]:
    lines = list(difflib.unified_diff(old, new, lineterm="", n=_CONTEXT))
    return ["@" if line.startswith("@@") else line for line in lines[2:]]
