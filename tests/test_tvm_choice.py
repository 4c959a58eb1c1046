"""Which code a kernel gets for which sizes: the register tile of a processor, the numbers of rows that have code of
their own, what threads share, and vectors and threads of what no one wrote by hand. Kernels are read, not compiled.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import pytest
import tvm
from tvm import relax, tirx

from moeify.backends.tvm.cpu import linear, schedules
from moeify.backends.tvm.cpu.grouped import make_rows, make_scatter
from moeify.backends.tvm.cpu.pipeline import to_kernels
from moeify.backends.tvm.cpu.product import Grouped
from moeify.backends.tvm.machine import Machine, Tile, machine
from tests.tvm_dense import module, sizes, this_machine

AVX512, AVX2, NEON, SSE = Tile(12, 32), Tile(6, 16), Tile(8, 8), Tile(4, 8)
TARGETS = {
    "llvm -mcpu=skylake-avx512": AVX512,
    "llvm -mcpu=znver3": AVX2,
    "llvm -mcpu=sandybridge": SSE,  # AVX without fused multiply-add
    "llvm -mcpu=x86-64": SSE,
    "llvm -mcpu=cortex-a76 -mtriple=aarch64-linux-gnu": NEON,
}


@pytest.mark.parametrize("target", TARGETS)
def test_the_tile_is_the_processors(target: str) -> None:
    assert machine(target).tile == TARGETS[target]


def with_cores(tile: Tile, cores: int) -> Machine:
    """This machine as if it had another tile and number of cores."""
    here = machine()
    target = tvm.target.Target({**dict(here.target.export()), "num-cores": cores})
    return dataclasses.replace(here, tile=tile, target=target)


def sums(kernel: tirx.PrimFunc) -> Counter[int]:
    """How many rows of sums there are of each width: a tile of n rows has n of them."""
    return Counter(int(width) for width in re.findall(r"alloc_buffer\(\((\d+),\)", kernel.script()))


def threads(kernel: tirx.PrimFunc) -> list[int]:
    """The lengths of the loops that threads share."""
    return [int(length) for length in re.findall(r"T\.parallel\((?:T\.int64\()?(\d+)\)", kernel.script())]


# Code for n rows has n rows of sums. A tile of few rows has code for each smaller number; 12 has 8, 4, 2 and 1.
LINEAR_ROWS = {AVX512: 12 + 8 + 4 + 2 + 1, AVX2: 21, NEON: 36, SSE: 10}
# Experts seldom have whole tiles: up to 6 rows each number has code, then every second one.
EXPERT_ROWS = {AVX512: 21 + 8 + 10 + 12, AVX2: 21, NEON: 21 + 8, SSE: 10}


@pytest.mark.parametrize("tile", LINEAR_ROWS, ids=str)
def test_a_linear_layer_has_code_for_these_numbers_of_rows(tile: Tile) -> None:
    kernel = linear.make(64, 24, with_cores(tile, 2), bias=True)
    assert sums(kernel) == {tile.columns: LINEAR_ROWS[tile]}


@pytest.mark.parametrize(
    ("outputs", "cores", "tasks"),
    [
        (64, 2, 4 * 2),  # 4 panels of 16: halves, so that each of the cores has four tasks
        (128, 2, 8),  # 8 panels are enough
        (16, 2, 8),
        (17, 2, 2 * 4),  # a panel that is not full is one too
        (64, 1, 4),
        (64, 16, 4 * 16),
        (1024, 16, 64),
    ],
)
def test_threads_of_a_linear_layer_have_four_tasks_each(outputs: int, cores: int, tasks: int) -> None:
    assert threads(linear.make(outputs, 24, with_cores(AVX2, cores), bias=False)) == [tasks]


@pytest.mark.parametrize("tile", EXPERT_ROWS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_experts_have_code_for_these_numbers_of_rows(tile: Tile, gated: bool) -> None:
    spec = Grouped(4, 24, 64, tile, k=2, gated=gated)
    assert sums(make_rows(spec)) == {tile.columns: EXPERT_ROWS[tile]}
    assert spec.panels == 64 // (tile.columns // 2 if gated else tile.columns)  # gate and up side by side in one tile


def test_one_expert_a_token_shares_panels_and_several_own_columns() -> None:
    """Where a token has two experts, their results are added by the thread that owns the columns."""
    one, two = (Grouped(4, 24, 64, AVX2, k=k) for k in (1, 2))
    assert threads(make_scatter(one)) == threads(make_rows(one))
    assert threads(make_scatter(two)) == [64 // 16] * 2  # zeros first, then sums


@pytest.mark.parametrize(
    ("shape", "threaded", "lanes"),
    [
        ((64, 64), True, 16),  # 4096 elements are worth threads
        ((63, 64), False, 16),
        ((64, 72), True, 16),  # axes of known length are one
        ((3, 8), False, 8),
        ((3, 4), False, 4),
        ((3, 5), False, None),
        (("b", 64), True, 16),  # an unknown length counts as 64
        (("b", 48), False, 16),
        (("b", 72), True, 8),
        (("b", 65), True, None),
    ],
    ids=str,
)
def test_threads_and_vectors_of_what_is_pointwise(
    shape: tuple[int | str, ...], threaded: bool, lanes: int | None
) -> None:
    (b,) = sizes("b")
    known = tuple(b if size == "b" else size for size in shape)
    assert scheduled(lambda e, x: e.emit(relax.op.add(x, x)), known) == (threaded, lanes)


@pytest.mark.parametrize(
    ("shape", "axis", "threaded", "lanes"),
    [
        ((64, 64), -1, True, None),  # one sum after the other along the last axis
        ((64, 64), 0, True, 16),  # vectors of sums along another
        ((8, 8), 0, False, 8),
        ((8, 7), 0, False, None),
    ],
    ids=str,
)
def test_threads_and_vectors_of_sums(shape: tuple[int, ...], axis: int, threaded: bool, lanes: int | None) -> None:
    assert scheduled(lambda e, x: e.emit(relax.op.sum(x, axis)), shape) == (threaded, lanes)


def scheduled(emit: Any, shape: tuple[Any, ...]) -> tuple[bool, int | None]:
    """Whether the only kernel has threads, and the width of its vectors."""
    mod, _ = module(emit, [(shape, "float32")])
    found = schedules.schedule(to_kernels(mod, this_machine())).functions.values()
    (text,) = [function.script() for function in found if isinstance(function, tirx.PrimFunc)]
    widths = {int(width) for width in re.findall(r"T\.vectorized\((?:T\.int64\()?(\d+)\)", text)}
    assert len(widths) <= 1
    return "T.parallel(" in text, next(iter(widths), None)
