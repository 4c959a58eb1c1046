"""``moeify passes``, ``methods``, ``routers``, ``losses`` and ``backends``: what there is, from the tables of names."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

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


def routers(
    table: Annotated[
        bool, typer.Option("--table", help="What each can do: experts a token gets, weights, losses, ...")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """The routers (convert --router)."""
    from moeify.nn.routers import ROUTERS

    if not table:
        _list("routers", ROUTERS, as_json)
        return
    from moeify.cli.figures import table as aligned
    from moeify.training.router_facts import HEADER, all_facts

    found = all_facts()
    if as_json:
        write_json({"routers": [asdict(one) for one in found]})
        return
    screen = Screen()
    for number, line in enumerate(aligned(HEADER, [one.cells() for one in found], screen.width)):
        screen.line(line, "bold" if number == 0 else None)


def losses(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """The router losses (convert --router-loss)."""
    from moeify.nn.losses import LOSSES

    _list("losses", LOSSES, as_json)


def backends(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """The targets a program is lowered to."""
    from moeify.backends import BACKENDS
    from moeify.backends.onnxruntime import kernel_build

    library = kernel_build.library()
    facts = {"kernel_library": None if library is None else {"path": str(library), "isa": kernel_build.isa()}}
    _list("backends", BACKENDS, as_json, facts)
    if not as_json:
        there = f"built for this machine ({kernel_build.isa()}): {library}" if library else kernel_build.reason()
        Screen().paragraph("onnxruntime's kernel library:", there, column=0)


def _list(kind: str, registry: Registry, as_json: bool, facts: dict[str, Any] | None = None) -> None:
    """``facts`` stand beside the entries in JSON."""
    entries = registry.summaries()
    if as_json:
        write_json({kind: [{"name": n, "options": o, "summary": s} for n, o, s in entries], **(facts or {})})
        return
    screen = Screen()
    column = max(len(name) for name, _, _ in entries) + 2
    for name, choices, summary in entries:
        screen.paragraph(name, summary, column=column, style="bold")
        if choices:
            screen.paragraph("", f"options: {choices}", column=column)
