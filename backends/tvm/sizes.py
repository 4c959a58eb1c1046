"""Sizes of tensors, some of them known only when the program runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.emitter import Emitter


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether these shapes are equal, provably."""
    return len(a) == len(b) and all(same_size(p, q) for p, q in zip(a, b, strict=True))


def same_size(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(tvm.sym.Analyzer().can_prove_equal(a, b))


def broadcast(a: list[Any], b: list[Any]) -> list[Any] | None:
    """The common leading sizes of two operands; None where they do not fit or cannot be proved to."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    out = list(longer[: len(longer) - len(shorter)])
    for p, q in zip(longer[len(out) :], shorter, strict=True):
        if q == 1 or same_size(p, q):
            out.append(p)
        elif p == 1:
            out.append(q)
        else:
            return None
    return out


def in_kernel(sizes: Sequence[Any]) -> list[Any]:
    """The sizes as a kernel declares them: numbers as they are, a fresh variable for each of the others."""
    return [size if isinstance(size, int) else T.int64() for size in sizes]


def spelled(sizes: Sequence[Any]) -> str:
    """For names of kernels: ``4xn`` is 4 by anything."""
    return "x".join(str(size) if isinstance(size, int) else "n" for size in sizes)


def made_by(emitter: Emitter, x: Any, operator: str) -> Any:
    """The call of that Relax operator that ``x`` is bound to, or None."""
    value = emitter.builder.lookup_binding(x) if isinstance(x, relax.Var) else None
    return value if isinstance(value, relax.Call) and value.op == Op.get(operator) else None
