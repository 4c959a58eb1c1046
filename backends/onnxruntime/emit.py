"""Building ONNX nodes in the place of a neutral node."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy
import onnx_ir as ir

CONTRIB = "com.microsoft"


class Emitter:
    """Makes nodes that will stand in the place of ``node``; ``commit`` puts them there.

    Every node and every new value is named under ``prefix`` (the block's path and call), so that a profile can be
    added up by block and Netron shows where things belong.
    """

    def __init__(self, model: ir.Model, node: ir.Node, prefix: str) -> None:
        assert node.graph is not None
        self.model, self.node, self.prefix = model, node, prefix
        self._tape = ir.tape.Tape()
        # Several nodes can stand for one call, under one prefix: the numbers go on.
        self._count = sum(1 for other in node.graph if (other.name or "").startswith(f"{prefix}/"))

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", name: str = "", **attributes: Any
    ) -> ir.Value:
        return self.many(op_type, *inputs, outputs=1, domain=domain, name=name, **attributes)[0]

    def many(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", name: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """A node of several outputs."""
        full = self._name(name or op_type)
        values = [ir.Value(name=full if outputs == 1 else f"{full}.{i}") for i in range(outputs)]
        version = 1 if domain else None
        self._tape.op_multi_out(op_type, inputs, attributes, outputs=values, domain=domain, version=version, name=full)
        return values

    def constant(self, value: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A small initializer; equal ones are one."""
        array = numpy.asarray(value, dtype=dtype.numpy())
        what = hashlib.sha256(array.tobytes()).hexdigest()[:12] if array.size > 4 else "_".join(map(str, array.flat))
        name = f"moeify.{dtype.name.lower()}{list(array.shape)}.{what}".replace(" ", "")
        return self.initializer(name, ir.Tensor(array, dtype=dtype, name=name))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """The initializer of that name, made from ``tensor`` if there is none."""
        graph = self.model.graph
        if name in graph.initializers:
            return graph.initializers[name]
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
        )
        graph.register_initializer(value)
        return value

    def commit(self, *results: ir.Value) -> None:
        """Let the readers of the neutral node read ``results``, which take over the names of its outputs."""
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, self._tape.nodes)
        for old, new in zip(self.node.outputs, results, strict=True):
            name, old.name = old.name, f"{old.name}.neutral"
            new.type, new.shape = new.type or old.type, new.shape or old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            new.name = name
        graph.remove(self.node, safe=True)
        for domain in {node.domain for node in self._tape.nodes if node.domain}:
            self.model.opset_imports.setdefault(domain, 1)

    def _name(self, name: str) -> str:
        self._count += 1
        return f"{self.prefix}/{self._count:02d}.{name}"
