"""Small pieces that the kernels of the CUDA target are built of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

_THREADS = 256
# One thread copies 16 bytes at once where it can: the widest load there is.
_BYTES = {"float32": 4, "float16": 2}
DTYPES = tuple(_BYTES)


@contextmanager
def function() -> Iterator[IRBuilder]:
    """A PrimFunc under construction; ``.get()`` of what this gives is the function, after the block."""
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("main")
        B.func_attr({"tirx.noalias": True})
        yield builder


def size(value: int | None, name: str = "n") -> Any:
    """A size that is fixed, or a variable of the kernel."""
    return tirx.Var(name, "int64") if value is None else tirx.const(value, "int64")


def argument(name: str, shape: Sequence[Any], dtype: str) -> Any:
    return B.match_buffer(B.arg(name, B.handle()), tuple(shape), dtype)


@contextmanager
def each(total: Any, threads: int = _THREADS) -> Iterator[Any]:
    """One thread for each of ``total`` indices, as a launch of its own.

    A launch without blocks is an error of CUDA, so there is always one.
    """
    blocks = tirx.max((total + (threads - 1)) // threads, tirx.const(1, "int64"))
    with B.thread_binding(blocks, thread="blockIdx.x") as block, B.thread_binding(threads, thread="threadIdx.x") as th:
        index = block * threads + th
        with B.If(index < total), B.Then(), B.sblock("each"):
            B.reads()
            B.writes()
            yield index


def scratch(count: int, dtype: str) -> Any:
    """Values of one thread's own."""
    return B.sblock_alloc_buffer((count,), dtype, scope="local")


def vector(width: int | None, dtype: str) -> int:
    """How many neighbours of a row of that width can be copied at once: rows must begin aligned."""
    return 1 if width is None else math.gcd(width, 16 // _BYTES[dtype])


def at_least_one(value: Any) -> Any:
    return tirx.max(value, tirx.const(1, "int64"))
