"""``moeify passes``, ``methods``, ``routers`` and ``backends``: what there is, from the tables of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.cli import options
from moeify.cli.output import Screen, write_json

if TYPE_CHECKING:
    from moeify.registry import Registry


def passes(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """The passes, in the order of the default pipeline."""
    from moeify.pipeline import PASSES

    _list("passes", PASSES, as_json)


def methods(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """The ways to make experts (convert --method)."""
    from moeify.experts import METHODS

    _list("methods", METHODS, as_json)


def routers(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """The routers (convert --router)."""
    from moeify.nn.routers import ROUTERS

    _list("routers", ROUTERS, as_json)


def backends(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """The targets a program is lowered to."""
    from moeify.backends import BACKENDS

    _list("backends", BACKENDS, as_json)


def _list(kind: str, registry: Registry, as_json: bool) -> None:
    entries = registry.summaries()
    if as_json:
        write_json({kind: [{"name": n, "options": o, "summary": s} for n, o, s in entries]})
        return
    screen = Screen()
    column = max(len(name) for name, _, _ in entries) + 2
    for name, choices, summary in entries:
        screen.paragraph(name, summary, column=column, style="bold")
        if choices:
            screen.paragraph("", f"options: {choices}", column=column)
