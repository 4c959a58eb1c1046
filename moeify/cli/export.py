"""``moeify export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeify.cli import options
from moeify.cli.output import only_json, write_json


def export(
    model: Annotated[str, typer.Argument(metavar="FILE.pt2", help="What 'moeify convert' wrote.")],
    to: Annotated[
        str, typer.Option("--to", metavar="BACKEND", help="The runtime, see 'moeify backends'.")
    ] = "onnxruntime",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT.onnx", help="What to write.  [FILE's name, here]")
    ] = None,
    target: Annotated[
        str,
        typer.Option(metavar="WHERE", help="cpu, cuda, or portable: fused in ONNX Runtime, standard ONNX elsewhere."),
    ] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float32, float16 or bfloat16.")] = "float32",
    bits: Annotated[
        int, typer.Option(metavar="N", help="Quantise the experts to 8 or 4 bits (target cuda, half precision).")
    ] = 0,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens (batch x sequence) you expect in one call: decides the lowering.")
    ] = 128,
    threads: Annotated[int, typer.Option(metavar="N", help="Threads you will run it with; 0: all cores.")] = 0,
    lowering: Annotated[
        str, typer.Option(metavar="NAME", help="Use this lowering for every block: split, com.microsoft.MoE, ...")
    ] = "",
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the lowerings on this machine instead of estimating.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, metavar="X", help="Largest relative error.  [1e-4 in float32]")
    ] = None,
    fallback: Annotated[
        str | None, typer.Option(metavar="split", help="Lower a block that fails verification again, this way.")
    ] = None,
    data: options.Data = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Lower FILE.pt2 to a runtime's file, verify it on that runtime, write it."""
    from moeify.api.export import export_file
    from moeify.backends import BACKENDS
    from moeify.cli import export_summary
    from moeify.cli.progress import Bars

    kind = BACKENDS.cls(to)
    if to == "pt2":
        from moeify.errors import UsageError

        raise UsageError(f"{model} is a pt2 already", hint="--to onnxruntime")
    backend = kind(target=target, dtype=dtype, bits=bits, tokens=tokens, threads=threads, lowering=lowering)
    with only_json(as_json), Bars() as bars:
        report = export_file(
            model,
            output,
            backend,
            data=data,
            tolerance=tolerance,
            measure=measure,
            fallback=fallback,
            progress=bars,
        )
    if as_json:
        write_json(report.to_dict())
    else:
        export_summary.show(report)
