"""The ``portable`` lowering: the nodes of ``contrib``, and in the file a function of the same name.

ONNX Runtime has a kernel for ``com.microsoft::MoE`` and does not look at the function; any other runtime expands the
function into standard ONNX. One file, one copy of the weights, every runtime.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import onnx
import onnx_ir as ir

from moeify.backends.onnxruntime import contrib
from moeify.backends.onnxruntime.contrib import approximation
from moeify.backends.onnxruntime.emit import CONTRIB, Emitter
from moeify.backends.onnxruntime.mixture import Mixture
from moeify.backends.onnxruntime.neutral import OPSET

__all__ = ["approximation", "lower", "unfit"]

_NAME = "MoE"
_KEY = (CONTRIB, _NAME, "")

# One expert's rows, found by its column of gates: no more work than the kernel does. The function knows no size, so
# blocks of any E, K, I and type share it. Gates are float32 because TopK takes no bfloat16 before opset 24.
_FUNCTION = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{name} <{attributes}> (x_TD, logits_TE, fc1_EIH, fc1_bias_EI, fc2_EDF, fc2_bias_ED) => (y_TD) {{
    k = Constant <value_int: int = @k> ()
    first_axis = Constant <value_ints = [0]> ()
    k_1 = Unsqueeze (k, first_axis)
    single_TE = Cast <to = 1> (logits_TE)
    best_TK, experts_TK = TopK <axis = 1> (single_TE, k_1)
    weights_TK = Softmax <axis = 1> (best_TK)
    shape = Shape (logits_TE)
    none_TE = ConstantOfShape (shape)
    gates_TE = ScatterElements <axis = 1> (none_TE, experts_TK, weights_TK)
    gates_ET = Transpose <perm = [1, 0]> (gates_TE)
    shape_x = Shape (x_TD)
    zero = Constant <value_float = 0.0> ()
    typed_zero = CastLike (zero, x_TD)
    zeros_TD = Expand (typed_zero, shape_x)
    y_TD = Scan <num_scan_inputs = 5, body = expert
        (sum_TD, gate_T, fc1_IH, fc1_bias_I, fc2_DF, fc2_bias_D) => (more_TD) {{
            found_1R = NonZero (gate_T)
            rows_R1 = Transpose <perm = [1, 0]> (found_1R)
            x_RD = GatherND (x_TD, rows_R1)
            hidden_RI = Gemm <transB = 1> (x_RD, fc1_IH, fc1_bias_I)
            {activation}
            out_RD = Gemm <transB = 1> (active_RF, fc2_DF, fc2_bias_D)
            gate_R = GatherND (gate_T, rows_R1)
            minus_one = Constant <value_ints = [-1]> ()
            gate_R1 = Unsqueeze (gate_R, minus_one)
            typed_gate_R1 = CastLike (gate_R1, x_TD)
            weighted_RD = Mul (out_RD, typed_gate_R1)
            before_RD = GatherND (sum_TD, rows_R1)
            after_RD = Add (before_RD, weighted_RD)
            more_TD = ScatterND (sum_TD, rows_R1, after_RD)
        }}> (zeros_TD, gates_ET, fc1_EIH, fc1_bias_EI, fc2_EDF, fc2_bias_ED)
}}
"""

# hidden_RI [R, I] to active_RF [R, F], as the kernel computes it.
_ACTIVATIONS: Mapping[str, str] = {
    "relu": "active_RF = Relu (hidden_RI)",
    "gelu": 'active_RF = Gelu <approximate = "tanh"> (hidden_RI)',
    "silu": "sigmoid_RF = Sigmoid (hidden_RI)   active_RF = Mul (hidden_RI, sigmoid_RF)",
    "identity": "active_RF = Identity (hidden_RI)",
    "swiglu": """
            even = Constant <value_ints = [0]> ()
            odd = Constant <value_ints = [1]> ()
            end = Constant <value_ints = [9223372036854775807]> ()
            step = Constant <value_ints = [2]> ()
            gate_RF = Slice (hidden_RI, even, end, odd, step)
            up_RF = Slice (hidden_RI, odd, end, odd, step)
            sigmoid_RF = Sigmoid (gate_RF)
            silu_RF = Mul (gate_RF, sigmoid_RF)
            active_RF = Mul (silu_RF, up_RF)
    """,
}


def lower(emit: Emitter, mixture: Mixture) -> None:
    """Replace a ``DispatchFFN``, and add the function to the model if it is not there. ``unfit`` must be None."""
    logits_TE = contrib.routing_logits(emit, mixture)
    attributes = contrib.attributes(mixture)
    shape = mixture.shape
    fc1_width = 2 * shape.d_expert if mixture.gated else shape.d_expert
    y_TD = emit.op(
        _NAME,
        mixture.x,
        logits_TE,
        contrib.fc1_weight(emit, mixture),
        contrib.fc1_bias(emit, mixture) or _zeros(emit, mixture, (shape.num_experts, fc1_width)),
        mixture.stacked["down"],
        mixture.stacked.get("down_bias") or _zeros(emit, mixture, (shape.num_experts, shape.d_out)),
        domain=CONTRIB,
        **attributes,
    )
    if _KEY not in emit.model.functions:
        emit.model.functions[_KEY] = function(str(attributes["activation_type"]))
    contrib.commit(emit, mixture, y_TD)


def unfit(mixture: Mixture, provider: str) -> str | None:
    """Why this mixture cannot be in the portable form, in one line; None when it can.

    A model has one function of the name, and a function has one activation: the first block that is lowered says
    which. Runtimes that expand it take any width.
    """
    reason = contrib.unfit(mixture, provider)
    if reason is not None:
        return reason
    wanted, there = contrib.activation_type(mixture), _registered(mixture)
    if there not in (None, wanted):
        return f"the model's function {CONTRIB}::{_NAME} computes {there}, and this block needs {wanted}"
    return None


def function(activation: str) -> ir.Function:
    """``com.microsoft::MoE`` in standard ONNX, for one of the operator's activations.

    Computes what the kernel computes with ``normalize_routing_weights`` 1, from two-dimensional rows, both biases
    given, SwiGLU interleaved. E, K, I and the type are those of the call.
    """
    names = [
        "k",
        "activation_type",
        "normalize_routing_weights",
        *(["swiglu_fusion"] if activation == "swiglu" else []),
    ]
    text = _FUNCTION.format(
        domain=CONTRIB,
        opset=OPSET,
        name=_NAME,
        attributes=", ".join(names),
        activation=_ACTIVATIONS[activation],
    )
    made = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    made.doc_string = f"What the com.microsoft.MoE kernel of ONNX Runtime computes with the activation {activation}."
    return made


def _registered(mixture: Mixture) -> str | None:
    """The activation of the function in the model, read from a node that calls it."""
    assert mixture.node.graph is not None
    for node in mixture.node.graph:
        if node.domain == CONTRIB and node.op_type == _NAME:
            return node.attributes["activation_type"].as_string()
    return None


def _zeros(emit: Emitter, mixture: Mixture, shape: tuple[int, ...]) -> ir.Value:
    """A bias of zeros: the inputs of a function have no absent ones that its body could test for."""
    return emit.constant(numpy.zeros(shape), mixture.dtype)
