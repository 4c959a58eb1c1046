"""Which attributes and sizes the CUDA kernels refuse, or take and compute something else with.

Sources: ``GetCapability`` of the provider for recurrences, transposed convolutions and casts; for the mixtures what
was measured with 1.31 (an attribute that is ignored or read as another layout gives wrong numbers, not an error).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

CAPABILITY = "needs a GPU of compute capability 8.0 or newer"
_GATES = {
    "LSTM": ("sigmoid", "tanh", "tanh", "sigmoid", "tanh", "tanh"),
    "RNN": ("tanh", "tanh"),
    "GRU": ("sigmoid", "tanh", "sigmoid", "tanh"),
}
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ACTIVATIONS = ("relu", "gelu", "silu", "swiglu", "identity")


def left_to_the_cpu(node: ir.Node) -> str | None:
    """Why the provider does not claim a node although it has a kernel for its types."""
    rule = _PLACED.get(node.op_type) if not node.domain else None
    return rule(node) if rule is not None else None


def misused(node: ir.Node) -> str | None:
    """Why the kernel that takes the node would fail, or compute something else."""
    rule = _COMPUTED.get((node.domain, node.op_type))
    return rule(node) if rule is not None else None


def _recurrence(node: ir.Node) -> str | None:
    for name in ("activation_alpha", "activation_beta", "clip"):
        if name in node.attributes:
            return f"the CUDA kernel of {node.op_type} has no {name}"
    if "activations" in node.attributes:
        named = [name.lower() for name in node.attributes["activations"].as_strings()]
        if tuple(named) != _GATES[node.op_type][: len(named)]:
            return f"the CUDA kernel of {node.op_type} has no activations {', '.join(named)}"
    if node.op_type == "LSTM" and _int(node, "input_forget"):
        return "the CUDA kernel of LSTM has no input_forget"
    if node.op_type == "LSTM" and _given(node, 7):
        return "the CUDA kernel of LSTM has no peepholes"
    if node.op_type == "GRU" and "linear_before_reset" in node.attributes and not _int(node, "linear_before_reset"):
        return "the CUDA kernel of GRU has linear_before_reset = 1 only"
    return None


def _transposed_convolution(node: ir.Node) -> str | None:
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else []
    half = len(pads) // 2
    if list(pads[:half]) != list(pads[half:]):
        return f"ConvTranspose pads unevenly, {list(pads)}"
    if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() in ("SAME_UPPER", "SAME_LOWER"):
        return "the CUDA provider takes no ConvTranspose of auto_pad SAME"
    return None


def _cast(node: ir.Node) -> str | None:
    return "there are no strings on CUDA" if _int(node, "to") == int(ir.DataType.STRING) else None


def _moe(node: ir.Node) -> str | None:
    return (
        _mixture(node, fc3=(6, 7))
        or _multiples(_sizes(node, 1), 8 if node.inputs[0] is not None and node.inputs[0].dtype in _HALF else 1)
        or next((f"{n} = {s} is under 16, the kernel's tile" for n, s in _sizes(node, 1).items() if s < 16), None)
    )


def _qmoe(node: ir.Node) -> str | None:
    bits, block = _int(node, "expert_weight_bits", 4), _int(node, "block_size")
    if bits not in (4, 8):
        return f"expert_weight_bits = {bits}: the kernel has 4 and 8"
    if _int(node, "weights_prepacked", -1) != 0:
        return "weights_prepacked is not 0: the kernel would read the weights as packed for CUTLASS already"
    if block and block not in (32, 64, 128):
        return f"block_size = {block}: the kernel has 32, 64 and 128"
    if _given(node, 14):
        return "router_weights is given, and the CUDA kernel ignores it"
    return _mixture(node, fc3=(8, 9, 10)) or _multiples(_sizes(node, 8 // bits), 64)


def _mixture(node: ir.Node, fc3: Sequence[int]) -> str | None:
    activation = node.attributes["activation_type"].as_string() if "activation_type" in node.attributes else "relu"
    if activation not in _ACTIVATIONS:
        return f"activation_type = {activation}: the kernel has {', '.join(_ACTIVATIONS)}"
    if _int(node, "normalize_routing_weights") != 1:
        return "normalize_routing_weights is not 1: the CPU kernel then gives zeros, so one file would not do for both"
    if any(_given(node, index) for index in fc3):
        return "fc3 is given: the CUDA kernel runs without the gate"
    if activation == "swiglu" and _int(node, "swiglu_fusion") != 1:
        return "swiglu_fusion is not 1, the only layout that both providers take"
    return None


def _sizes(node: ir.Node, values_per_element: int) -> dict[str, int]:
    """D and F of a mixture from fc1 [E, F or 2 F, D] and fc2 [E, D, F], as far as they are known."""
    fc1, fc2 = node.inputs[2], node.inputs[5 if node.op_type == "QMoE" else 4]
    found: dict[str, int] = {}
    for name, weight in (("D", fc1), ("F", fc2)):
        if weight is not None and weight.shape is not None and isinstance(weight.shape[-1], int):
            found[name] = weight.shape[-1] * values_per_element
    return found


def _multiples(sizes: Mapping[str, int], of: int) -> str | None:
    return next(
        (f"{name} = {size} is no multiple of {of}, as the kernel needs" for name, size in sizes.items() if size % of),
        None,
    )


def _int(node: ir.Node, name: str, default: int = 0) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


_PLACED: Mapping[str, Callable[[ir.Node], str | None]] = {
    "LSTM": _recurrence,
    "RNN": _recurrence,
    "GRU": _recurrence,
    "ConvTranspose": _transposed_convolution,
    "Cast": _cast,
}
_COMPUTED: Mapping[tuple[str, str], Callable[[ir.Node], str | None]] = {
    ("com.microsoft", "MoE"): _moe,
    ("com.microsoft", "QMoE"): _qmoe,
}
