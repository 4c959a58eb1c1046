"""``moeify.kernels.DispatchFFN`` in standard ONNX: what a runtime computes that does not have the kernel library.

A model-local function of the operator's name. A runtime that knows an operator of the name ignores it; any other
expands it. The body unpacks the experts and is then the ``split`` lowering. Unpacking reads constants alone, so that a
runtime that folds constants does it once, at loading, and what is left is ``split`` itself.

Blocks of another form (sizes, activation, biases, storage) have a function of their own, told apart by ``overload``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import onnx_ir as ir

from moeify.backends.onnxruntime import dispatch
from moeify.backends.onnxruntime.activations import activate
from moeify.backends.onnxruntime.emit import Emitter
from moeify.backends.onnxruntime.kernel_names import DOMAIN, OP
from moeify.backends.onnxruntime.kernel_pack import COLUMNS
from moeify.backends.onnxruntime.mixture import ROLES
from moeify.backends.onnxruntime.neutral import OPSET
from moeify.backends.roofline import Shape

MATRICES = ("up", "gate", "down")
INPUTS = ("x", "experts", "weights", *ROLES, *(f"{role}_scale" for role in MATRICES))
_ATTRIBUTES = {
    "activation": ir.AttributeType.STRING,
    "d_expert": ir.AttributeType.INT,
    "d_out": ir.AttributeType.INT,
    "block": ir.AttributeType.INT,
}
_SINGLE = ir.DataType.FLOAT


@dataclass(frozen=True)
class Form:
    """What tells one function from another. ``roles`` are the weights that are there, ``block`` is of int8."""

    shape: Shape
    activation: str
    roles: frozenset[str]
    storage: str
    block: int = 0

    @property
    def name(self) -> str:
        """``8x768x384x768.top2.gelu.float16.up_bias.down_bias``: an ``overload``."""
        s = self.shape
        storage = f"{self.storage}-{self.block}" if self.block else self.storage
        extra = [role for role in ROLES if role in self.roles and role not in ("up", "down")]
        sizes = f"{s.num_experts}x{s.d_model}x{s.d_expert}x{s.d_out}"
        return ".".join([sizes, f"top{s.top_k}", self.activation, storage, *extra])

    def attributes(self) -> dict[str, Any]:
        """Of the node."""
        return {
            "activation": self.activation,
            "d_expert": self.shape.d_expert,
            "d_out": self.shape.d_out,
            "block": self.block,
        }

    def size(self, role: str) -> tuple[int, int]:
        """(width, depth) of a matrix."""
        s = self.shape
        return (s.d_out, s.d_expert) if role == "down" else (s.d_expert, s.d_model)


def function(form: Form) -> ir.Function:
    """The operator's function for blocks of one form. Inputs that the form does not have are not read."""
    values = {name: ir.Value(name=name) for name in INPUTS}
    emit = _Body()
    y_TO = _body(emit, form, values)
    last = max(i for i, value in enumerate(values.values()) if value.uses())  # the node has no more inputs either
    inputs = list(values.values())[: last + 1]
    graph = ir.Graph(inputs, [y_TO], nodes=emit.nodes, opset_imports={"": OPSET})
    attributes = [ir.Attr(name, kind, None) for name, kind in _ATTRIBUTES.items()]
    made = ir.Function(DOMAIN, OP, form.name, graph=graph, attributes=attributes)
    made.doc_string = "What the kernel library of moeify computes, in standard operators."
    return made


def _body(emit: _Body, form: Form, values: dict[str, ir.Value]) -> ir.Value:
    num_experts, top_k = form.shape.num_experts, form.shape.top_k
    counts_E, order_R = dispatch.sort(emit, values["experts"], num_experts)
    parts, _ = dispatch.split(emit, dispatch.tokens(emit, order_R, top_k), counts_E, num_experts, lacking=False)
    results = []
    for e, part in enumerate(parts):
        rows = emit.op("Gather", values["x"], part, name=f"expert-{e}.rows")
        results.append(_expert(emit, form, values, e, rows))
    return dispatch.combine(emit, dispatch.join(emit, results), order_R, values["weights"], top_k)


def _expert(emit: _Body, form: Form, values: dict[str, ir.Value], e: int, rows_RD: ir.Value) -> ir.Value:
    def linear(role: str, rows: ir.Value) -> ir.Value:
        inputs = [rows, _unpacked(emit, form, values, e, role)]
        if f"{role}_bias" in form.roles:
            inputs.append(_of_expert(emit, values, f"{role}_bias", e))
        return emit.op("Gemm", *inputs, name=f"expert-{e}.{role}", transB=1)

    hidden = linear("up", rows_RD)
    if "gate" in form.roles:
        gate = activate(emit, form.activation, linear("gate", rows_RD), _SINGLE)
        hidden = emit.op("Mul", gate, hidden, name=f"expert-{e}.gated")
    else:
        hidden = activate(emit, form.activation, hidden, _SINGLE)
    return linear("down", hidden)


def _unpacked(emit: _Body, form: Form, values: dict[str, ir.Value], e: int, role: str) -> ir.Value:
    """[width, depth] float32 of the panels [P, depth, 16] of one expert: ``kernel_pack.unpack``."""
    (width, depth), name = form.size(role), f"expert-{e}.{role}-weight"
    panels = _of_expert(emit, values, role, e)
    if form.storage != "float32":
        panels = emit.op("Cast", panels, name=name, to=_SINGLE)
    if form.storage == "int8":
        scales = _of_expert(emit, values, f"{role}_scale", e)
        panels = emit.op("Mul", panels, _spread(emit, form.block, depth, scales, name), name=name)
    columns = emit.op("Transpose", panels, name=name, perm=[0, 2, 1])
    rows = emit.op("Reshape", columns, emit.constant([-1, depth]), name=name)
    if width % COLUMNS == 0:
        return rows
    return emit.op("Slice", rows, emit.constant([0]), emit.constant([width]), emit.constant([0]), name=name)


def _of_expert(emit: _Body, values: dict[str, ir.Value], role: str, e: int) -> ir.Value:
    return emit.op("Gather", values[role], emit.constant(e), name=f"expert-{e}.{role}-weight", axis=0)


def _spread(emit: _Body, block: int, depth: int, scales: ir.Value, name: str) -> ir.Value:
    """Scales [P, B, 16] as [P, depth, 16]; one of a whole row is left to broadcast."""
    if not block:
        return scales
    copies = emit.op(
        "Tile", emit.op("Unsqueeze", scales, emit.constant([2]), name=name), emit.constant([1, 1, block, 1]), name=name
    )
    flat = emit.op("Reshape", copies, emit.constant([0, -1, COLUMNS]), name=name)
    return emit.op("Slice", flat, emit.constant([0]), emit.constant([depth]), emit.constant([1]), name=name)


class _Body(Emitter):
    """Builds a function, which has no initializers: constants are nodes."""

    def __init__(self) -> None:
        self.prefix = OP
        self._tape = ir.tape.Tape()
        self._count = 0
        self._constants: dict[tuple, ir.Value] = {}

    @property
    def nodes(self) -> list[ir.Node]:
        return list(self._tape.nodes)

    def constant(self, value: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        array = numpy.asarray(value, dtype=dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", name="constant", value=ir.Tensor(array, dtype=dtype))
        return self._constants[key]
