"""What the matcher knows about operators: which keep rows apart, which only move elements, which are attention."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

# ATen leaves the pointwise tag off these.
_UNTAGGED_POINTWISE = {
    "hardswish", "hardsigmoid", "log_sigmoid", "prelu", "_prelu_kernel", "relu6", "selu", "celu", "elu",
    "square", "masked_fill", "type_as", "clone", "zeros_like", "ones_like", "full_like", "where", "clamp",
}  # fmt: skip
# Random operators carry the tag in ATen; a hidden value that is random is not one of ours.
_NOT_POINTWISE = {"rrelu", "bernoulli", "normal", "rand_like", "randn_like", "native_dropout", "copy"}

DROPOUT = {"dropout", "feature_dropout", "alpha_dropout"}
CASTS = {"to", "_to_copy", "type_as", "float", "half", "bfloat16"}
SAME = {"clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh"}
RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
REORDERS = {"transpose", "t", "permute", "numpy_T", "mT", "movedim", "swapaxes", "swapdims"}
CUTS = {"slice", "narrow", "select"}
SPLITS = {"chunk", "split", "split_with_sizes", "unbind", "tensor_split", "unsafe_chunk", "unsafe_split"}
NORMS = {"layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"}
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp"}
SOFTMAX = {"softmax", "log_softmax", "_softmax", "_log_softmax"}
VIEWS = RESHAPES | REORDERS
ATTENTION = {
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "softmax", "_softmax", "bmm", "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_native_multi_head_attention",
}  # fmt: skip
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def name_of(node: fx.Node) -> str:
    """The operator's name without namespace and overload, '' for anything that is not an operator."""
    target = node.target
    if node.op == "call_function":
        if target is operator.getitem:
            return "getitem"
        if isinstance(target, torch._ops.OpOverload):
            return target._schema.name.partition("::")[2]
    return ""


def value(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor of a node's result, None when it is not one tensor."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a node's tensor, symbolic where they are dynamic."""
    val = value(node)
    return tuple(val.shape) if val is not None else ()


def hint(size: Any) -> int:
    """The size that a dimension had in the example."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if isinstance(size, torch.SymInt) and size.node.hint is not None else int(size)


def hints(node: fx.Node) -> tuple[int, ...]:
    return tuple(hint(size) for size in shape(node))


def is_pointwise(node: fx.Node) -> bool:
    """Every element of the result depends on the elements at the same place of the operands only."""
    name = name_of(node)
    if not name or name in _NOT_POINTWISE or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or name in _UNTAGGED_POINTWISE or name in CASTS


def is_row_wise(node: fx.Node) -> bool:
    """It can keep rows apart, if the axes fit."""
    name = name_of(node)
    return (
        name == "getitem"
        or is_pointwise(node)
        or name in DROPOUT | SAME | VIEWS | CUTS | SPLITS | NORMS | REDUCTIONS | SOFTMAX
        or name in {"glu", "cat", "stack", "expand", "expand_as", "view_as", "reshape_as"}
    )


def is_data(node: fx.Node) -> bool:
    """It holds tensors (not a size)."""
    val = node.meta.get("val")
    if isinstance(val, (list, tuple)):
        return any(isinstance(v, torch.Tensor) for v in val)
    return isinstance(val, torch.Tensor) or node.op in ("get_attr", "placeholder")


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors a node reads, sizes left out."""
    return [arg for arg in node.all_input_nodes if is_data(arg)]


def is_constant(node: fx.Node) -> bool:
    """It is a parameter or buffer, or computed from those and numbers alone through at most a few views."""
    for _ in range(8):
        if node.op == "get_attr":
            return True
        inputs = data_inputs(node)
        if not inputs:
            return node.op == "call_function"
        if len(inputs) != 1 or node.op != "call_function":
            return all(arg.op == "get_attr" for arg in inputs) and node.op == "call_function"
        node = inputs[0]
    return False


def arguments(node: fx.Node) -> Any:
    """``node.args`` without the union of everything that an argument may be."""
    return node.args


def arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
