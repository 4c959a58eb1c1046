"""Runs passes over a Program: rules before and after each, the log and the time into the history."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from moeify.errors import BrokenProgram
from moeify.ir.program import HistoryEntry, Program
from moeify.pipeline import PASSES
from moeify.pipeline.base import Log, Pass, Rule
from moeify.pipeline.rules import ALWAYS

Observer = Callable[[Pass, Program], None]


def run(program: Program, texts: Iterable[str], after: Observer | None = None) -> Program:
    """Run the passes named by ``texts`` in order on the program, in place; ``after`` sees it after each.

    Raises BrokenProgram when a pass leaves a graph that breaks a rule, and whatever a pass refuses with.
    """
    for text in texts:
        one: Pass = PASSES.parse(text)
        _check(program, one.requires, one, "before")
        log = Log()
        start = time.perf_counter()
        one.apply(program, log)
        seconds = time.perf_counter() - start
        _check(program, (*ALWAYS, *one.ensures), one, "after")
        program.history.append(HistoryEntry(str(one), tuple(log.lines), seconds))
        if after is not None:
            after(one, program)
    return program


def _check(program: Program, rules: Iterable[Rule], one: Pass, when: str) -> None:
    for rule in rules:
        try:
            rule(program)
        except BrokenProgram as error:
            what = f"{when} {one.name}, rule {rule.__name__.replace('_', ' ')!r} is broken: {error.what}"
            raise BrokenProgram(what, where=error.where, hint="this is a bug in moeify: please report it") from error
