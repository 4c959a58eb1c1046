"""``moeify plan`` and ``moeify calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeify.cli import flags, options
from moeify.cli.output import Screen, only_json, write_json, write_text
from moeify.errors import BadOption

if TYPE_CHECKING:
    from moeify.distributed.network import Machine
    from moeify.distributed.setting import Setting

_ITEMS = {"float32": 4, "float16": 2, "bfloat16": 2}
_GIGA = 1e9


def plan(
    model: options.Model,
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Ranks in all, one per device.")],
    per_node: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ranks in a node.  [8]")] = None,
    expert_ranks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ranks that share a set of experts.  [the most that all hold some]"),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens of a rank in a step.  [4096]")] = None,
    mode: Annotated[str, typer.Option(metavar="MODE", help="dropless or capacity.")] = "dropless",
    capacity_factor: Annotated[float | None, typer.Option(metavar="X", help="Of mode capacity.  [1.25]")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, float16, bfloat16.  [the model's]")
    ] = None,
    inference: Annotated[bool, typer.Option("--inference", help="Forward alone, no training state.")] = False,
    bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Of a rank to other nodes, one direction.  [50]")
    ] = None,
    latency: Annotated[float | None, typer.Option(metavar="US", help="Of a message to another node.  [10]")] = None,
    intra_bandwidth: Annotated[float | None, typer.Option(metavar="GB/S", help="Inside a node.  [450]")] = None,
    intra_latency: Annotated[float | None, typer.Option(metavar="US", help="Inside a node.  [5]")] = None,
    peak: Annotated[float | None, typer.Option(metavar="TFLOP/S", help="Of a rank.  [989]")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(metavar="GB/S", help="Of a rank.  [3350]")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Of a rank.  [80]")] = None,
    network: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What 'moeify calibrate -o' wrote; flags win over it.")
    ] = None,
    loads: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows of each expert, as JSON.")] = None,
    skew: Annotated[
        float | None, typer.Option(min=0.0, metavar="S", help="Without loads: Zipf exponent of the experts.  [0]")
    ] = None,
    placed: Annotated[bool, typer.Option("--placed", help="Times with the experts placed by their loads.")] = False,
    extra: Annotated[int, typer.Option(min=0, metavar="N", help="Places for copies of hot experts, per rank.")] = 1,
    write: Annotated[
        Path | None,
        typer.Option(metavar="OUT.pt2", help="Write MODEL with its experts placed; copies too with --inference."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png|.svg", help="Draw time by ranks, 8 to 4096 (needs matplotlib).")
    ] = None,
    method: options.Method = None,
    experts: options.Experts = None,
    top_k: options.TopK = None,
    router: options.Router = None,
    shared: options.Shared = None,
    shared_gate: options.SharedGate = None,
    blocks: options.Blocks = None,
    include: options.Include = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    overrides: options.Overrides = [],  # noqa: B006
    recipe_file: options.RecipeFile = None,
    inputs: options.Inputs = [],  # noqa: B006
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tensors by input name: count the rows of each expert on them.")
    ] = None,
    factory: options.Factory = None,
    allow: options.Allow = [],  # noqa: B006
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what expert parallelism would cost MODEL: memory, bytes, times, balance; every number with its source."""
    recipe = flags.recipe(
        recipe_file,
        overrides,
        include,
        method=method,
        experts=experts,
        top_k=top_k,
        router=router,
        shared=shared,
        shared_gate=shared_gate,
        blocks=blocks,
    )
    if plot is not None:
        from moeify.cli import plots

        plots.check(plot)
    from moeify.api import plan as planning
    from moeify.cli.progress import Bars

    setting = _setting(devices, per_node, expert_ranks, tokens, mode, capacity_factor, dtype, skew, placed, extra)
    machine = _machine(
        network,
        bandwidth=_times(bandwidth, _GIGA),
        latency=_times(latency, 1e-6),
        intra_bandwidth=_times(intra_bandwidth, _GIGA),
        intra_latency=_times(intra_latency, 1e-6),
        peak=_times(peak, 1e12),
        memory_bandwidth=_times(memory_bandwidth, _GIGA),
        memory=_times(memory, _GIGA),
    )
    with only_json(as_json), Bars() as bars:
        made = planning.plan_file(
            model, setting, machine, recipe=recipe, inputs=inputs, factory=factory, allow=allow, loads=loads, data=data,
            training=not inference, output=write, extra=extra if inference else 0, progress=bars,
        )  # fmt: skip
    if plot is not None:
        from moeify.cli import scaling_chart

        scaling_chart.draw(made, plot)
    if as_json:
        write_json({**made.to_dict(), "plot": str(plot) if plot else None})
        return
    from moeify.cli import plan_summary

    screen = Screen()
    plan_summary.show(screen, made)
    plan_summary.placed(screen, made, write)
    if plot is not None:
        screen.paragraph("wrote", str(plot), column=plan_summary.COLUMN, style="bold")


def calibrate(
    ranks: Annotated[int, typer.Option(min=2, metavar="N", help="Processes, on this machine.")] = 2,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="Threads of each.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Times each size is timed.")] = 15,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the figures for 'plan --network'.")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure latency and bandwidth of an all-to-all over gloo, and the arithmetic and memory rates beside it."""
    from moeify.cli import plan_summary
    from moeify.distributed import network
    from moeify.distributed.calibration import calibrate as measure

    with only_json(as_json):
        made = measure(ranks, threads=threads, rounds=rounds)
    found = network.to_dict(made.machine, made.where)
    if output is not None:
        import json

        write_text(output, json.dumps(found, indent=1) + "\n")
    if as_json:
        write_json({**found, "points": [list(point) for point in made.points], "output": str(output or "") or None})
        return
    screen = Screen()
    plan_summary.calibration(screen, made)
    if output is not None:
        screen.paragraph("wrote", str(output), column=plan_summary.COLUMN, style="bold")


def _setting(
    devices: int,
    per_node: int | None,
    expert_ranks: int | None,
    tokens: int | None,
    mode: str,
    capacity_factor: float | None,
    dtype: str | None,
    skew: float | None,
    placed: bool,
    extra: int,
) -> Setting:
    from moeify.distributed.setting import Setting, given

    if dtype is not None and dtype not in _ITEMS:
        raise BadOption(f"there is no type {dtype!r} here", hint=f"choose one of {', '.join(_ITEMS)}")
    default = Setting(8)
    return Setting(
        devices,
        per_node=given(per_node, default.per_node),
        tokens=given(tokens, default.tokens),
        expert_ranks=expert_ranks,
        mode=mode,
        capacity_factor=given(capacity_factor, default.capacity_factor),
        skew=given(skew, default.skew),
        placed=placed,
        extra=extra,
        item=_ITEMS[dtype] if dtype else None,
    )


def _machine(file: Path | None, **values: float | None) -> Machine:
    from moeify.distributed import network

    machine = network.read(file) if file else network.Machine()
    return machine.with_values(values)


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
