"""``moeify export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeify.cli import options
from moeify.cli.output import only_json, write_json

if TYPE_CHECKING:
    from moeify.backends.deploy import Deployment


def export(
    model: Annotated[str, typer.Argument(metavar="FILE.pt2", help="What 'moeify convert' wrote.")],
    to: Annotated[
        str, typer.Option("--to", metavar="BACKEND", help="The runtime, see 'moeify backends'.")
    ] = "onnxruntime",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="The .onnx file or TVM folder.  [FILE's name, here]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="WHERE", help="cpu, cuda; onnxruntime: portable too; tvm: 'llvm -mcpu=...' too.  [cpu]"),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="SM", help="tvm, target cuda: sm_80 or sm_90, the GPU's architecture.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="TYPE", help="float32, float16 or bfloat16.  [float32]")] = None,
    expert_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="target cpu: store the experts so, compute in float32: float32, float16, bfloat16. onnxruntime asks "
            "the kernel lowering for it and has int8 too, with a scale for each output, or int8-32, int8-64, int8-128, "
            "int8-256: one for so many inputs of an output, closer to the weights and a little larger.  [float32]",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="onnxruntime: quantise the experts to 8 or 4 bits (cuda, half precision)."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens (batch x sequence) expected in one call: decides the lowering.  [128]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads you will run it with; 0: all cores.  [0]")
    ] = None,
    lowering: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Use this for every block: split, kernel, com.microsoft.MoE; tvm: tuned, reference."
        ),
    ] = None,
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

        raise UsageError(f"{model} is a pt2 already", hint="--to onnxruntime or --to tvm")
    given = {
        "target": target,
        "arch": arch,
        "dtype": dtype,
        "expert_dtype": expert_dtype,
        "bits": bits,
        "tokens": tokens,
        "threads": threads,
        "lowering": lowering,
    }
    backend = _configured(kind, {name: value for name, value in given.items() if value is not None})
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


def _configured(kind: type[Deployment], given: dict[str, Any]) -> Deployment:
    from moeify.errors import BadOption

    for name in given:
        if name not in kind.options():
            raise BadOption(f"--{name.replace('_', '-')} is no option of the {kind.name} backend")
    return kind(**given)
