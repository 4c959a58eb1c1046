"""Products of matrices: linear layers by the target's own kernels, and products of two computed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from tvm import relax

from moeify.backends.tvm.conversions.activations import named
from moeify.backends.tvm.conversions.movement import permuted
from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.emitter import dtype_of, shape_of
from moeify.ir.emit import arguments

_aten = torch.ops.aten
_op = relax.op
_PASSES_ON = (_aten.dropout.default, _aten.alias.default, _aten.clone.default, _aten.contiguous.default)


def _linear(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    weight, bias = args["weight"], args["bias"]
    name = t.name(weight)
    if name is not None and weight.meta["val"].dim() == 2 and node.meta["val"].dim() >= 2:
        return by_name(t, node, t.tensor(args["input"]), name, bias)
    turned = t.tensor(weight)
    if weight.meta["val"].dim() == 2:
        turned = permuted(t, turned, [1, 0])
    return _add_bias(t, product(t, t.tensor(args["input"]), turned), bias)


def by_name(t: Translation, node: fx.Node | None, rows: Any, weight: str, bias: fx.Node | None) -> Any:
    """``rows @ weight.T + bias`` by the target's kernel. ``weight`` is the name of a constant [O, D].

    ``node`` is what computes the result, in this layout: an activation that alone reads it is computed with it and put
    into the environment, where the kernel takes it.
    """
    bias_name = t.name(bias)
    fits = bias is None or (bias_name is not None and bias.meta["val"].dim() == 1)
    reader, activation = _activation(node) if fits and node is not None else (None, "")
    if reader is not None:
        own = t.families("linear", t.emitter, rows, weight, bias_name, activation)
        if own is not None:
            t.env[reader] = t.conform(t.reshape(own, t.shape(reader)), reader.meta["val"])
            return own
    own = t.families("linear", t.emitter, rows, weight, bias_name if fits else None)
    if own is not None:
        return own if fits else _add_bias(t, own, bias)
    return _add_bias(t, product(t, rows, permuted(t, t.emitter.weights.plain(weight), [1, 0])), bias)


def _activation(node: fx.Node) -> tuple[fx.Node | None, str]:
    """The activation that alone reads a linear layer."""
    reader = node
    while len(reader.users) == 1:
        reader = next(iter(reader.users))
        if reader.op != "call_function" or not isinstance(reader.target, torch._ops.OpOverload):
            return None, ""
        activation = named(reader, arguments(reader))
        if activation is not None:
            same = reader.meta["val"].dtype == node.meta["val"].dtype
            return (reader, activation) if same else (None, "")
        if reader.target not in _PASSES_ON:
            return None, ""
    return None, ""


def _add_bias(t: Translation, value: Any, bias: fx.Node | None) -> Any:
    return value if bias is None else t.emit(_op.add(value, t.tensor(bias)))


def product(t: Translation, a: Any, b: Any) -> Any:
    """As torch.matmul, of tensors of any rank from 1 on, in their own type."""
    if len(shape_of(a)) >= 2 and len(shape_of(b)) >= 2:
        own = t.families("matmul", t.emitter, a, b)
        if own is not None:
            return own
    return t.emit(_op.matmul(a, b, out_dtype=dtype_of(a)))


def _matmul(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    """Of a fixed matrix, as its linear layer."""
    a, b = args["self"], args.get("other", args.get("mat2"))
    if t.name(b) is not None and b.meta["val"].dim() == 2 and a.meta["val"].dim() >= 2:
        return by_name(t, node, t.tensor(a), t.constants.derive(b, "T", _transpose), None)
    return product(t, t.tensor(a), t.tensor(b))


def _transpose(weight: torch.Tensor) -> torch.Tensor:
    return weight.t()


def _addmm(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    a, b = args.get("mat1", args.get("batch1")), args.get("mat2", args.get("batch2"))
    bias, alpha, beta = args["self"], args["alpha"], args["beta"]
    if t.name(b) is not None and b.meta["val"].dim() == 2 and alpha == 1 and beta == 1:
        return by_name(t, node, t.tensor(a), t.constants.derive(b, "T", _transpose), bias)
    value = product(t, t.tensor(a), t.tensor(b))
    dtype = node.meta["val"].dtype
    if alpha != 1:
        value = t.emit(_op.multiply(value, t.tensor(float(alpha), dtype)))
    if beta == 0:
        return value
    addend = t.aligned(t.tensor(bias), t.shape(node))
    if beta != 1:
        addend = t.emit(_op.multiply(addend, t.tensor(float(beta), dtype)))
    return t.emit(_op.add(value, addend))


def _einsum(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    equation = args["equation"].replace(" ", "")
    if "..." in equation:
        return NotImplemented
    return t.emit(_op.einsum([t.tensor(arg) for arg in args["tensors"]], equation))


TABLE: dict[Any, Convert] = {
    _aten.linear.default: _linear,
    _aten.matmul.default: _matmul,
    _aten.mm.default: _matmul,
    _aten.bmm.default: _matmul,
    _aten.mv.default: lambda t, node, args: product(t, t.tensor(args["self"]), t.tensor(args["vec"])),
    _aten.addmm.default: _addmm,
    _aten.baddbmm.default: _addmm,
    _aten.einsum.default: _einsum,
}
