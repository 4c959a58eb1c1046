"""Lowerings of the CPU run alone: emitted into a function, compiled, called with torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import tvm
from tvm import relax, tirx

from moeify.backends.tvm.cpu import pipeline
from moeify.backends.tvm.emitter import Emitter
from moeify.backends.tvm.machine import Machine, Tile, machine
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weights

TILES = [Tile(6, 16), Tile(12, 32), Tile(8, 8), Tile(4, 8)]


def this_machine(tile: Tile | None = None) -> Machine:
    here = machine("cpu")
    return here if tile is None else replace(here, tile=tile)


def sizes(names: str) -> list[Any]:
    """One symbolic size for each letter."""
    return [tirx.Var(name, "int64") for name in names]


def module(
    emit: Callable[..., Any],
    types: list[Any],
    weights: Mapping[str, torch.Tensor] | None = None,
    on: Machine | None = None,
) -> tuple[tvm.IRModule, Weights]:
    """``main(*inputs, *weights)`` that gives what ``emit(emitter, *inputs)`` does; types are (shape, dtype)."""
    made = Weights((weights or {}).__getitem__)
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", tensor_type(*type_)) for i, type_ in enumerate(types)]
    with builder.function("main"):
        with builder.dataflow():
            result = emit(Emitter(builder, on or this_machine(), made), *inputs)
            output = builder.emit_output(relax.Tuple([result]))
        builder.emit_func_output(output, params=[*inputs, *[weight.var for weight in made]])
    return builder.get(), made


def compiled(
    emit: Callable[..., Any],
    types: list[Any],
    weights: Mapping[str, torch.Tensor] | None = None,
    on: Machine | None = None,
) -> Callable[..., torch.Tensor]:
    """The same, as a function of torch tensors."""
    mod, made = module(emit, types, weights, on)
    main = relax.VirtualMachine(pipeline.compile(mod, on or this_machine()), tvm.cpu())["main"]
    values = [tvm.runtime.from_dlpack(weight.value()) for weight in made]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_dlpack(main(*[tvm.runtime.from_dlpack(x) for x in inputs], *values)[0])

    return run
