"""Module paths that differ by one number, as one label: ``encoder.layer.0-5``."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence


def group_paths(paths: Sequence[str]) -> list[list[int]]:
    """Positions of paths that fold into one label each, in order of first appearance."""
    skeletons: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for position, path in enumerate(paths):
        skeletons[tuple(_tokens(path)[::2])].append(position)
    groups = [group for members in skeletons.values() for group in _split(members, [_tokens(p) for p in paths])]
    return sorted(groups)


def label(paths: Sequence[str]) -> str:
    """The label of one group; equal paths count as one."""
    tokens = [_tokens(path) for path in paths]
    varying = _varying(tokens)
    if not varying:
        return paths[0]
    (position,) = varying
    numbers = sorted({int(t[position]) for t in tokens})
    return "".join(tokens[0][:position]) + ranges(numbers) + "".join(tokens[0][position + 1 :])


def ranges(numbers: Sequence[int]) -> str:
    """``0-5``, ``0-3,7``, or ``0,2..10`` for four or more with the same step."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) >= 4 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]},{numbers[1]}..{numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _tokens(path: str) -> list[str]:
    """Text and numbers by turns: the numbers stand at odd positions."""
    return re.split(r"(\d+)", path)


def _varying(tokens: list[list[str]]) -> list[int]:
    return [position for position in range(1, len(tokens[0]), 2) if len({t[position] for t in tokens}) > 1]


def _split(members: list[int], tokens: list[list[str]]) -> list[list[int]]:
    """Fix the outermost number that varies until at most one is left to vary."""
    varying = _varying([tokens[m] for m in members])
    if len(varying) <= 1:
        return [members]
    parts: dict[str, list[int]] = defaultdict(list)
    for member in members:
        parts[tokens[member][varying[0]]].append(member)
    return [group for part in parts.values() for group in _split(part, tokens)]
