"""The same operators as loops that follow their definitions: one thread, weights as the program has them, float64 sums.

What the fast kernels are compared with, on any shape and routing: ``TABLE`` takes the place of ``table.table()``.
Operators that TVM has too (``linear`` and the rest of the dense model) are left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.activations import Definitions
from moeify.backends.tvm.emitter import Emitter, dtype_of, shape_of
from moeify.backends.tvm.families import Experts, Families
from moeify.backends.tvm.types import tensor_type

_WIDE = Definitions("float64")
ACTIVATIONS, number, library = _WIDE.table(), _WIDE.number, _WIDE.library

Body = Callable[..., None]
Out = tuple[Sequence[Any], str]


def _dispatch_ffn(emitter: Emitter, x: Any, experts: Any, weights: Any, spec: Experts) -> Any:
    (tokens, k), E = shape_of(experts), spec.num_experts
    rows = tokens * k
    order = _call(emitter, f"moe_dispatch_e{E}", [experts], [((rows,), "int64")], lambda *b: _order(E, *b))
    # Of each sorted row: its expert and its token.
    expert = _call(emitter, "expert", [experts, order], [((rows,), "int64")], _expert_of_row)
    token = _call(emitter, f"token_k{k}", [order], [((rows,), "int64")], lambda *b: _token_of_row(k, *b))
    hidden = _up(emitter, "moe_up", x, token, expert, spec)
    down = _linear(emitter, "moe_rows", hidden, None, expert, spec.down, spec.down_bias)
    out = [((tokens, spec.d_out), dtype_of(x))]
    return _call(emitter, "moe_down", [down, order, weights], out, _combine)


def _permute(emitter: Emitter, x: Any, experts: Any, num_experts: int) -> Any:
    (tokens, width), k = shape_of(x), shape_of(experts)[1]
    out = [((tokens * k, width), dtype_of(x)), ((num_experts,), "int64"), ((tokens * k,), "int64")]
    return _call(emitter, "moe_permute", [x, experts], out, lambda *b: _permuted(num_experts, *b))


def _experts(emitter: Emitter, rows: Any, counts: Any, spec: Experts) -> Any:
    expert = _call(emitter, "expert_of_counts", [counts], [((shape_of(rows)[0],), "int64")], _expert_of_counts)
    hidden = _up(emitter, "moe_rows_up", rows, None, expert, spec)
    return _linear(emitter, "moe_rows", hidden, None, expert, spec.down, spec.down_bias)


def _grouped_linear(emitter: Emitter, rows: Any, counts: Any, weight: str, bias: str | None) -> Any:
    expert = _call(emitter, "expert_of_counts", [counts], [((shape_of(rows)[0],), "int64")], _expert_of_counts)
    return _linear(emitter, "moe_rows", rows, None, expert, weight, bias)


def _unpermute(emitter: Emitter, rows: Any, order: Any, weights: Any) -> Any:
    out = [((shape_of(weights)[0], shape_of(rows)[1]), dtype_of(rows))]
    return _call(emitter, "moe_unpermute", [rows, order, weights], out, _combine)


def _topk(emitter: Emitter, scores: Any, k: int) -> Any:
    tokens = shape_of(scores)[0]
    return _call(emitter, "topk", [scores], [((tokens, k), dtype_of(scores)), ((tokens, k), "int64")], _chosen)


def _route(emitter: Emitter, logits: Any, k: int) -> Any:
    return _topk(emitter, _call(emitter, "softmax", [logits], [(shape_of(logits), dtype_of(logits))], _softmax), k)


TABLE = Families(
    {
        "dispatch_ffn": _dispatch_ffn,
        "permute": _permute,
        "experts": _experts,
        "grouped_linear": _grouped_linear,
        "unpermute": _unpermute,
        "topk": _topk,
        "route": _route,
    }
)


def _up(emitter: Emitter, name: str, x: Any, token: Any | None, expert: Any, spec: Experts) -> Any:
    """The hidden rows: ``act(up)``, or ``act(gate) * up``."""
    up = _linear(emitter, name, x, token, expert, spec.up, spec.up_bias)
    out, act = [(shape_of(up), dtype_of(x))], ACTIVATIONS[spec.activation]
    if spec.gate is None:
        body: Body = lambda u, y: _each(y.shape, lambda *at: _put(y, act(_wide(u[at])), at))  # noqa: E731
        return _call(emitter, f"activated_{spec.activation}", [up], out, body)
    gate = _linear(emitter, name, x, token, expert, spec.gate, spec.gate_bias)
    body = lambda g, u, y: _each(y.shape, lambda *at: _put(y, act(_wide(g[at])) * _wide(u[at]), at))  # noqa: E731
    return _call(emitter, f"gated_{spec.activation}", [gate, up], out, body)


def _linear(emitter: Emitter, name: str, x: Any, token: Any | None, expert: Any, weight: str, bias: str | None) -> Any:
    """Row r: ``x[token[r]] @ weight[expert[r]].T + bias[expert[r]]``; ``x[r]`` without tokens."""
    inputs = [x, expert, emitter.weights.plain(weight)]
    inputs += [token] if token is not None else []
    inputs += [emitter.weights.plain(bias)] if bias is not None else []

    def body(x: Any, expert: Any, w: Any, *rest: Any) -> None:
        *more, y = rest

        def one(r: Any, o: Any) -> None:
            source = more[0][r] if token is not None else r
            first = _wide(more[-1][expert[r], o]) if bias is not None else number(0)
            _put(y, _sum(x.shape[1], lambda d: _wide(x[source, d]) * _wide(w[expert[r], o, d]), first), (r, o))

        _each(y.shape, one)

    words = ["gathered"] * (token is not None) + ["bias"] * (bias is not None)
    width = emitter.weights.source(weight).shape[1]
    return _call(emitter, "_".join([name, *words]), inputs, [((shape_of(expert)[0], width), dtype_of(x))], body)


def _order(num_experts: int, experts: Any, order: Any) -> None:
    """Slots in the order of their experts, and of the slots where those are equal."""
    place = T.alloc_buffer((1,), "int64")
    _put(place, _integer(0), (0,))

    def one(e: Any, t: Any, j: Any) -> None:
        with T.If(experts[t, j] == tirx.Cast("int64", e)), T.Then():
            _put(order, tirx.Cast("int64", t * experts.shape[1] + j), (place[0],))
            _put(place, place[0] + 1, (0,))

    _each((num_experts, *experts.shape), one)


def _expert_of_row(experts: Any, order: Any, expert: Any) -> None:
    k = experts.shape[1]
    _each(order.shape, lambda r: _put(expert, experts[tirx.floordiv(order[r], k), tirx.floormod(order[r], k)], (r,)))


def _token_of_row(k: int, order: Any, token: Any) -> None:
    _each(order.shape, lambda r: _put(token, tirx.floordiv(order[r], k), (r,)))


def _expert_of_counts(counts: Any, expert: Any) -> None:
    place = T.alloc_buffer((1,), "int64")
    _put(place, _integer(0), (0,))
    with T.serial(0, counts.shape[0]) as e, T.serial(0, counts[e]):
        _put(expert, tirx.Cast("int64", e), (place[0],))
        _put(place, place[0] + 1, (0,))


def _permuted(num_experts: int, x: Any, experts: Any, rows: Any, counts: Any, order: Any) -> None:
    _order(num_experts, experts, order)
    _each((num_experts,), lambda e: _put(counts, _integer(0), (e,)))
    _each(experts.shape, lambda t, j: _put(counts, counts[experts[t, j]] + 1, (experts[t, j],)))
    _each(rows.shape, lambda r, d: _put(rows, x[tirx.floordiv(order[r], experts.shape[1]), d], (r, d)))


def _combine(rows: Any, order: Any, weights: Any, y: Any) -> None:
    """Row r, times the weight of its slot, is added to the slot's token; the sum of a token is rounded once."""
    k = weights.shape[1]
    slot = lambda r: (tirx.floordiv(order[r], k), tirx.floormod(order[r], k))  # noqa: E731

    def one(t: Any, d: Any) -> None:
        here = lambda r: tirx.Select(slot(r)[0] == t, _wide(weights[slot(r)]) * _wide(rows[r, d]), number(0))  # noqa: E731
        _put(y, _sum(rows.shape[0], here, number(0)), (t, d))

    _each(y.shape, one)


def _chosen(scores: Any, values: Any, indices: Any) -> None:
    """The place of a score is the number of scores that go before it."""

    def one(t: Any, e: Any) -> None:
        mine = scores[t, e]

        def before(other: Any) -> Any:
            score = scores[t, other]
            same = tirx.any(score == mine, tirx.all(tirx.isnan(score), tirx.isnan(mine)))
            larger = tirx.any(score > mine, tirx.all(tirx.isnan(score), tirx.Not(tirx.isnan(mine))))
            return tirx.Select(tirx.any(larger, tirx.all(same, other < e)), number(1), number(0))

        place = T.bind(tirx.Cast("int64", _sum(scores.shape[1], before, number(0))))
        with T.If(place < values.shape[1]), T.Then():
            _put(values, mine, (t, place))
            _put(indices, tirx.Cast("int64", e), (t, place))

    _each(scores.shape, one)


def _softmax(x: Any, y: Any) -> None:
    def one(t: Any, e: Any) -> None:
        largest = T.alloc_buffer((1,), "float64")
        _put(largest, _wide(x[t, 0]), (0,))
        with T.serial(0, x.shape[1]) as other:
            _put(largest, tirx.Select(_wide(x[t, other]) > largest[0], _wide(x[t, other]), largest[0]), (0,))
        power = lambda other: library("exp", _wide(x[t, other]) - largest[0])  # noqa: E731
        _put(y, power(e) / _sum(x.shape[1], power, number(0)), (t, e))

    _each(x.shape, one)


def _call(emitter: Emitter, name: str, inputs: Sequence[Any], outs: Sequence[Out], body: Body) -> Any:
    """A kernel whose buffers are the inputs and then the results, of these shapes and types."""
    types = [(shape_of(value), dtype_of(value)) for value in inputs] + [(list(shape), dtype) for shape, dtype in outs]

    def make() -> tirx.PrimFunc:
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            handles = [T.arg(f"b{i}", T.handle()) for i in range(len(types))]
            body(*[_buffer(handle, *given) for handle, given in zip(handles, types, strict=True)])
        return builder.get()

    words = ["x".join([str(s) if isinstance(s, int) else "n" for s in shape] + [dtype]) for shape, dtype in types]
    kernel = emitter.kernel("_".join([name, "reference", *words]), make)
    result = [tensor_type(shape, dtype) for shape, dtype in outs]
    return emitter.call(kernel, inputs, result[0] if len(result) == 1 else result)


def _buffer(handle: Any, shape: Sequence[Any], dtype: str) -> Any:
    return T.match_buffer(handle, [s if isinstance(s, int) else T.int64() for s in shape], dtype)


def _each(shape: Sequence[Any], emit: Callable[..., None], *outer: Any) -> None:
    """``emit`` at every index of the shape."""
    if len(outer) == len(shape):
        emit(*outer)
        return
    with T.serial(0, shape[len(outer)]) as i:
        _each(shape, emit, *outer, i)


def _sum(size: Any, value: Callable[[Any], Any], first: Any) -> Any:
    total = T.alloc_buffer((1,), "float64")
    _put(total, first, (0,))
    with T.serial(0, size) as i:
        _put(total, total[0] + value(i), (0,))
    return total[0]


def _put(buffer: Any, value: Any, at: tuple[Any, ...]) -> None:
    """Store, rounded to the type of the buffer where the value is a float64."""
    T.buffer_store(buffer, tirx.Cast(buffer.dtype, value) if str(value.ty.dtype) == "float64" else value, list(at))


def _wide(value: Any) -> Any:
    return tirx.Cast("float64", value)


def _integer(value: int) -> Any:
    return tirx.const(value, "int64")
