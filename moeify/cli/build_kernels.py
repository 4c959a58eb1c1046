"""``moeify build-kernels``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from moeify.cli import options
from moeify.cli.output import Screen, only_json, write_json

_COLUMN = 13


def build_kernels(
    print_path: Annotated[
        bool,
        typer.Option("--print-path", help="Compile nothing: print where the library is, for programs that load it."),
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compile the fused CPU kernels that ONNX Runtime loads for files exported with the kernel lowering.

    It takes a C++17 compiler and nothing else. Without the library such files run too, in standard operators.
    """
    from moeify.backends.onnxruntime import kernel_build
    from moeify.cli.progress import Bars
    from moeify.errors import RuntimeUnavailable

    started = time.perf_counter()
    if print_path:
        path = kernel_build.library()
        if path is None:
            raise RuntimeUnavailable(kernel_build.reason(), hint="'moeify build-kernels' compiles them")
    else:
        was_there = kernel_build.library() is not None
        with only_json(as_json), Bars() as bars:
            bars.stage("compiling the kernels")
            path = kernel_build.build()
    isa = kernel_build.isa()
    if as_json:
        write_json({"path": str(path), "isa": isa})
        return
    if print_path:
        typer.echo(path)
        return
    screen = Screen()
    seconds = time.perf_counter() - started
    made = "before, from these sources" if was_there else f"by {kernel_build.compiler()} in {seconds:.1f} s"
    screen.paragraph("compiled", made, column=_COLUMN)
    screen.paragraph("runs here", f"with its {isa} kernels; it chooses by the CPU where it is loaded", column=_COLUMN)
    screen.paragraph("library", str(path), column=_COLUMN, style="bold")
