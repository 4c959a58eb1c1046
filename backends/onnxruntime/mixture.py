"""What a neutral node says, read once for all lowerings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import onnx_ir as ir

from moeify.backends.calls import Call
from moeify.backends.onnxruntime.emit import Emitter
from moeify.backends.roofline import Shape

# The order of the weights in the operators' signatures.
ROLES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


@dataclass(frozen=True)
class Mixture:
    """One fused call: ``y[t] = sum_k weights[t, k] * expert[experts[t, k]](x[t])``.

    ``stacked`` holds the initializers by role, absent ones left out: up and gate [E, F, D], down [E, D, F], biases
    [E, F] and [E, D].
    """

    node: ir.Node
    call: Call
    x: ir.Value
    experts: ir.Value
    weights: ir.Value
    stacked: Mapping[str, ir.Value]
    activation: str
    top_k: int

    @property
    def shape(self) -> Shape:
        num_experts, d_expert, d_model = sizes(self.stacked["up"])
        return Shape(num_experts, d_model, d_expert, sizes(self.stacked["down"])[1], self.top_k)

    @property
    def gated(self) -> bool:
        return "gate" in self.stacked

    @property
    def dtype(self) -> ir.DataType:
        assert self.stacked["up"].dtype is not None
        return self.stacked["up"].dtype

    def array(self, role: str) -> numpy.ndarray:
        return array(self.stacked[role])


def read(node: ir.Node, call: Call) -> Mixture:
    """The mixture that a ``DispatchFFN`` stands for."""
    x, experts, weights, *stacked = node.inputs
    assert x is not None
    assert experts is not None
    assert weights is not None
    top_k = next((v.shape[1] for v in (experts, weights) if v.shape is not None and isinstance(v.shape[1], int)), None)
    assert top_k is not None, f"{call.name}: the number of experts of a token is not known"
    roles = {role: value for role, value in zip(ROLES, stacked) if value is not None}
    return Mixture(node, call, x, experts, weights, roles, node.attributes["activation"].as_string(), top_k)


def array(value: ir.Value) -> numpy.ndarray:
    """The values of an initializer, without a copy."""
    assert value.const_value is not None, f"{value.name} is not an initializer"
    return value.const_value.numpy()


def sizes(value: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer."""
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def static_size(value: ir.Value | None, dim: int) -> int:
    """A size that does not depend on the input."""
    size = value.shape[dim] if value is not None and value.shape is not None else None
    assert isinstance(size, int), f"dimension {dim} of {value} is not fixed"
    return size


def expert_weight(
    emit: Emitter, stacked: ir.Value, expert: int, units: numpy.ndarray | None = None, axis: int = 0
) -> ir.Value:
    """The weight of one expert as an initializer of its own: runtimes repack constant matrices once, at loading.

    ``units`` are the entries along ``axis`` that stay, all by default; what is left is gathered when it is written.
    """
    assert stacked.dtype is not None
    if units is None:
        name = f"{stacked.name}.{expert}"
        return emit.initializer(name, ir.Tensor(array(stacked)[expert], dtype=stacked.dtype, name=name))
    name = f"{stacked.name}.{expert}.used"
    shape = list(sizes(stacked)[1:])
    shape[axis] = len(units)
    dtype = stacked.dtype

    def gather() -> ir.Tensor:
        return ir.Tensor(array(stacked)[expert].take(units, axis=axis), dtype=dtype, name=name)

    return emit.initializer(name, ir.LazyTensor(gather, dtype=dtype, shape=ir.Shape(shape), name=name))
