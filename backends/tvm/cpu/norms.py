"""Layer norm and RMS norm over the last axis: one pass for each moment, one for the result, threads over rows."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moeify.backends.tvm.cpu.rowwise import Lanes, add, each, vectors
from moeify.backends.tvm.emitter import Emitter, dtype_of, rows, shape_of
from moeify.backends.tvm.sizes import made_by, same
from moeify.backends.tvm.types import tensor_type


def layer_norm(emitter: Emitter, x: Any, weight: Any | None, bias: Any | None, eps: float) -> Any:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` in float32. Gives None for other types."""
    return _norm(emitter, x, weight, bias, eps, centred=True)


def rms_norm(emitter: Emitter, x: Any, weight: Any | None, eps: float) -> Any:
    """``x / sqrt(mean(x^2) + eps) * weight`` in float32. Gives None for other types."""
    return _norm(emitter, x, weight, None, eps, centred=False)


def _norm(emitter: Emitter, x: Any, weight: Any | None, bias: Any | None, eps: float, *, centred: bool) -> Any:
    width = shape_of(x)[-1]
    given = {"weight": weight, "bias": bias}
    if not isinstance(width, int) or any(dtype_of(v) != "float32" for v in (x, weight, bias) if v is not None):
        return None
    terms = _summands(emitter, x)
    flat = [rows(emitter, term)[0] for term in terms]
    leading = shape_of(x)[:-1]
    present = tuple(name for name, value in given.items() if value is not None)
    words = [*(["of_sum"] if len(terms) == 2 else []), *present]
    name = "_".join([f"{'layer' if centred else 'rms'}_norm_{width}_eps{eps!r}".replace(".", "p"), *words])
    lanes = emitter.machine.tile.columns
    kernel = emitter.kernel(
        name.replace("-", "m"), lambda: make(width, eps, lanes, centred=centred, terms=len(terms), present=present)
    )
    arguments = [*flat, *(given[name] for name in present)]
    y = emitter.call(kernel, arguments, tensor_type((flat[0].ty.shape.values[0], width), "float32"))
    return y if len(leading) == 1 else emitter.emit(relax.op.reshape(y, (*leading, width)))


def _summands(emitter: Emitter, x: Any) -> list[Any]:
    """``a`` and ``b`` where ``x`` is ``a + b`` of equal shapes: the kernel then adds them itself.

    A sum that others read too is computed once more, which is cheaper than a pass over memory.
    """
    call = made_by(emitter, x, "relax.add")
    if call is not None and all(same(shape_of(term), shape_of(x)) for term in call.args):
        return list(call.args)
    return [x]


def make(
    width: int, eps: float, lanes: int, *, centred: bool, terms: int = 1, present: tuple[str, ...] = ()
) -> tirx.PrimFunc:
    """``(x, further terms of the sum, weight and bias where they are, y)``, rows of ``width``."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        names = [*(f"x{i}" for i in range(terms)), *present, "y"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        count = T.int64()
        xs = [T.match_buffer(handles[f"x{i}"], (count, width), "float32") for i in range(terms)]
        scales = {name: T.match_buffer(handles[name], (width,), "float32") for name in present}
        y = T.match_buffer(handles["y"], (count, width), "float32")
        with T.parallel(0, count) as row:
            if terms > 1:  # the sum is written to the result first, and read from there

                def total(at: Any, n: int) -> None:
                    each(n, lambda j: T.buffer_store(y, xs[0][row, at + j] + xs[1][row, at + j], [row, at + j]))

                vectors(width, lanes, total)
            _row(y if terms > 1 else xs[0], y, row, width, lanes, eps, scales, centred=centred)
    return builder.get()


def _row(
    x: Any, y: Any, row: Any, width: int, lanes: int, eps: float, scales: dict[str, Any], *, centred: bool
) -> None:
    def summed(value: Any) -> Any:
        lane = Lanes(lanes, 0.0, add)
        vectors(width, lanes, lambda at, n: lane.add(lambda j: value(at + j), n))
        return lane.result() * tirx.const(1.0 / width, "float32")

    mean = T.bind(summed(lambda column: x[row, column])) if centred else tirx.const(0.0, "float32")

    def square(column: Any) -> Any:
        difference = x[row, column] - mean if centred else x[row, column]
        return difference * difference

    variance = summed(square)
    scale = T.bind(tirx.const(1.0, "float32") / tirx.sqrt(variance + tirx.const(eps, "float32")))

    def value(column: Any) -> Any:
        here = (x[row, column] - mean) * scale if centred else x[row, column] * scale
        if "weight" in scales:
            here = here * scales["weight"][column]
        return here + scales["bias"][column] if "bias" in scales else here

    vectors(width, lanes, lambda at, n: each(n, lambda j: T.buffer_store(y, value(at + j), [row, at + j])))
