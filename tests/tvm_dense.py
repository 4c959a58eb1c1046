"""Lowerings of the CPU run alone: emitted into a function, compiled, called with torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from tvm import tirx

from moeify.backends.tvm.cpu import pipeline
from moeify.backends.tvm.machine import Machine, Tile, machine
from tests.tvm_functions import calling, module

__all__ = ["TILES", "compiled", "module", "sizes", "this_machine"]

TILES = [Tile(6, 16), Tile(12, 32), Tile(8, 8), Tile(4, 8)]


def this_machine(tile: Tile | None = None) -> Machine:
    here = machine("cpu")
    return here if tile is None else replace(here, tile=tile)


def sizes(names: str) -> list[Any]:
    """One symbolic size for each letter."""
    return [tirx.Var(name, "int64") for name in names]


def compiled(
    emit: Callable[..., Any],
    types: list[Any],
    weights: Mapping[str, torch.Tensor] | None = None,
    on: Machine | None = None,
) -> Callable[..., torch.Tensor]:
    """What ``emit(emitter, *inputs)`` gives, as a function of torch tensors; types are (shape, dtype)."""
    mod, made = module(emit, types, weights, on)
    every = calling(pipeline.compile(mod, on or this_machine()), made)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        (result,) = every(*inputs)
        return result

    return run
