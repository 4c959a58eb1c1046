"""Which rows each expert has: a stable counting sort of the chosen experts, and the form that grouped kernels read.

Letters as in ``families``; R = T * K rows (copies of tokens), slot ``t * K + k`` of the k-th expert of token t.

A *plan* is int32 [2 E + 2]: the number A of experts that have rows, then those A experts (E places), then the first
sorted row of each and, after the last, R (E + 1 places). Kernels walk its A groups and never see an idle expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.emitter import Emitter, shape_of
from moeify.backends.tvm.types import tensor_type


def plan_size(experts: int) -> int:
    return 2 * experts + 2


def wide(value: Any) -> Any:
    """As an index into memory."""
    return tirx.Cast("int64", value)


@dataclass(frozen=True)
class Plan:
    """How kernels read a plan."""

    buffer: Any
    experts: int

    def groups(self) -> Any:
        return wide(self.buffer[0])

    def expert(self, group: Any) -> Any:
        return wide(self.buffer[1 + group])

    def start(self, group: Any) -> Any:
        return wide(self.buffer[1 + self.experts + group])


def dispatch(emitter: Emitter, experts: Any, num_experts: int) -> tuple[Any, Any]:
    """The plan, and the slots [R] int32 in sorted order. ``experts`` is [T, K] int64."""
    T_, K = shape_of(experts)
    kernel = emitter.kernel(f"moe_dispatch_e{num_experts}_k{K}", lambda: make_dispatch(num_experts, K))
    out = [tensor_type((plan_size(num_experts),), "int32"), tensor_type((T_ * K,), "int32")]
    both = emitter.call(kernel, [experts], out)
    return emitter.emit(both[0]), emitter.emit(both[1])


def plan_of_counts(emitter: Emitter, counts: Any, num_experts: int) -> Any:
    """The plan of rows that are sorted already. ``counts`` is [E] int64."""
    kernel = emitter.kernel(f"moe_plan_e{num_experts}", lambda: make_plan(num_experts))
    return emitter.call(kernel, [counts], tensor_type((plan_size(num_experts),), "int32"))


def make_dispatch(num_experts: int, k: int) -> tirx.PrimFunc:
    """``(experts [T, K], plan [2 E + 2], slots [T * K])``. Raises where an expert is not one of the E."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("experts", "plan", "slots")]
        tokens = T.int64()
        experts = T.match_buffer(handles[0], (tokens, k), "int64")
        plan = T.match_buffer(handles[1], (plan_size(num_experts),), "int32")
        slots = T.match_buffer(handles[2], (tokens * k,), "int32")
        place = T.alloc_buffer((num_experts,), "int32")
        histogram(experts, place, num_experts)
        fill_plan(plan, place, num_experts)
        with T.serial(0, tokens) as t, T.serial(0, tirx.const(k, "int64")) as j:
            e = T.bind(experts[t, j])
            T.buffer_store(slots, tirx.Cast("int32", t * k + j), [wide(place[e])])
            T.buffer_store(place, place[e] + 1, [e])
    return builder.get()


def make_plan(num_experts: int) -> tirx.PrimFunc:
    """``(counts [E], plan [2 E + 2])``."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        handles = [T.arg(name, T.handle()) for name in ("counts", "plan")]
        counts = T.match_buffer(handles[0], (num_experts,), "int64")
        plan = T.match_buffer(handles[1], (plan_size(num_experts),), "int32")
        place = T.alloc_buffer((num_experts,), "int32")
        with T.serial(0, tirx.const(num_experts, "int64")) as e:
            T.buffer_store(place, tirx.Cast("int32", counts[e]), [e])
        fill_plan(plan, place, num_experts)
    return builder.get()


def histogram(experts: Any, counts: Any, num_experts: int) -> None:
    """Emit ``counts[e] =`` how often e is chosen."""
    tokens, k = experts.shape
    with T.serial(0, tirx.const(num_experts, "int64")) as e:
        T.buffer_store(counts, tirx.const(0, "int32"), [e])
    with T.serial(0, tokens) as t, T.serial(0, tirx.const(int(k), "int64")) as j:
        e = T.bind(experts[t, j])
        inside = tirx.all(e >= tirx.const(0, "int64"), e < tirx.const(num_experts, "int64"))
        with T.Assert(inside, f"an expert is not one of 0..{num_experts - 1}"):
            T.buffer_store(counts, counts[e] + 1, [e])


def fill_plan(plan: Any, counts: Any, num_experts: int) -> None:
    """Emit the plan of ``counts``, each of which becomes the first sorted row of its expert."""
    run = T.alloc_buffer((2,), "int32")  # groups so far, rows so far
    zero = tirx.const(0, "int32")
    T.buffer_store(run, zero, [0])
    T.buffer_store(run, zero, [1])
    with T.serial(0, plan_size(num_experts)) as i:
        T.buffer_store(plan, zero, [i])
    with T.serial(0, num_experts) as e:
        n = T.bind(counts[e])
        T.buffer_store(counts, run[1], [e])
        with T.If(n > zero), T.Then():
            T.buffer_store(plan, e, [run[0] + 1])
            T.buffer_store(plan, run[1], [run[0] + (1 + num_experts)])
            T.buffer_store(run, run[0] + 1, [0])
            T.buffer_store(run, run[1] + n, [1])
    T.buffer_store(plan, run[0], [0])
    T.buffer_store(plan, run[1], [run[0] + (1 + num_experts)])
