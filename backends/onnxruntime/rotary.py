"""Rotary tables of one batch row for all rows: onnxscript fuses to an operator that does not broadcast them."""

from __future__ import annotations

from typing import Any

import numpy
import onnx_ir as ir

from moeify.backends.onnxruntime.emit import Emitter


def widen_rotary(model: ir.Model) -> int:
    """Rewrite in place; gives how many nodes were changed.

    Before:  RotaryEmbedding(x [B, H, S, D], cos [1, S, D / 2], sin [1, S, D / 2])
    After:   RotaryEmbedding(x, Expand(cos, [B, 1, 1]), Expand(sin, [B, 1, 1]))

    The product that onnxscript fuses, ``x * cos + rotate_half(x) * sin``, broadcasts over the batch; the operator does
    not, and ONNX Runtime refuses the tables when it runs.
    """
    done = 0
    wide: dict[tuple[str | None, str], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) != 3:  # a fourth input picks rows
            continue
        x, *tables = node.inputs
        assert x is not None
        assert x.shape is not None
        batch = x.shape[0]
        if all(table is not None and table.shape is not None and table.shape[0] == batch for table in tables):
            continue
        emit = Emitter(model, node, f"{node.name}.wide")
        widened = []
        for table in tables:
            assert table is not None
            key = table.name, str(batch)
            if key not in wide:
                ones = emit.constant(numpy.ones(2, dtype=numpy.int64))
                sizes = emit.op("Concat", emit.op("Shape", x, name="batch", start=0, end=1), ones, axis=0)
                wide[key] = emit.op("Expand", table, sizes)
            widened.append(wide[key])
        emit.commit(emit.op("RotaryEmbedding", x, *widened, **dict[str, Any](node.attributes)))
        done += 1
    return done
