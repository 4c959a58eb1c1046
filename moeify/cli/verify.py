"""``moeify verify``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from moeify.cli import options
from moeify.cli.figures import error, table
from moeify.cli.output import Screen, only_json, write_json


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference: a dense or a converted model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.")],
    data: options.Data = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="X", help="Largest relative error that is agreement.  [1e-5]"),
    ] = None,
    inputs: options.Inputs = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    factory: options.Factory = None,
    allow: options.Allow = [],  # noqa: B006
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> int:
    """Run A and B on the same inputs and compare their outputs; exit code 1 when they do not agree."""
    from moeify import api

    with only_json(as_json):
        found = api.verify_files(
            a,
            b,
            data=str(data) if data else None,
            inputs=inputs,
            factory=factory,
            allow=allow,
            tolerance=tolerance,
        )
    code = 0 if found.agree else 1
    if as_json:
        write_json({"a": a, "b": b, **dataclasses.asdict(found)})
        return code
    screen = Screen()
    rows = [(o.name, error(o.max_abs), error(o.max_relative), f"{o.cosine:.7f}") for o in found.outputs]
    for number, line in enumerate(table(("output", "largest difference", "relative", "cosine"), rows, screen.width)):
        screen.line(line, "bold" if number == 0 else None)
    screen.line()
    verdict = "agree" if found.agree else "do not agree"
    screen.line(f"{a} and {b} {verdict}: largest relative error {error(found.max_relative_error)}", "bold")
    return code
