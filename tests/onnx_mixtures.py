"""Mixtures for the tests of ONNX lowerings: a model that is one neutral node, and what it must compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.backends.calls import Call
from moeify.backends.deploy import Choice
from moeify.backends.onnxruntime import mixture as mixtures
from moeify.backends.onnxruntime.lowering import Lowering, Neutral, lower
from moeify.backends.onnxruntime.mixture import ROLES, Mixture
from moeify.backends.onnxruntime.neutral import DOMAIN, OPSET
from moeify.ir.modes import set_training
from moeify.ir.program import Program

TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
}


@dataclass(frozen=True)
class Case:
    """E experts of D -> F -> O, K of them for a token."""

    activation: str = "relu"
    gated: bool = False
    bias: bool | str = True  # or the only role that has one
    E: int = 4
    K: int = 2
    D: int = 16
    F: int = 8
    O: int | None = None  # noqa: E741  (the width of the output, D unless it says otherwise)
    dtype: torch.dtype = torch.float32

    def stacked(self) -> dict[str, Tensor]:
        """The weights by role, every expert's its own; results are of the order of 1."""
        generator = torch.Generator().manual_seed(0)
        out = self.O or self.D
        sizes = {"up": (self.F, self.D), "gate": (self.F, self.D), "down": (out, self.F)}
        sizes |= {"up_bias": (self.F,), "gate_bias": (self.F,), "down_bias": (out,)}
        made = {}
        for role in ROLES:
            values = torch.randn(self.E, *sizes[role], generator=generator)
            if role.startswith("gate") and not self.gated:
                continue
            if role.endswith("bias") and self.bias is not True and self.bias != role:
                continue
            made[role] = (values / sizes[role][-1] ** 0.5 if values.dim() == 3 else values).to(self.dtype)
        return made

    def inputs(self, tokens: int = 6) -> dict[str, Tensor]:
        """Rows, different experts for every token, and weights that do not sum to one."""
        generator = torch.Generator().manual_seed(1)
        scores = torch.rand(tokens, self.E, generator=generator)
        return {
            "x": torch.randn(tokens, self.D, generator=generator).to(self.dtype),
            "experts": scores.argsort(dim=1)[:, : self.K].contiguous(),
            "weights": (torch.rand(tokens, self.K, generator=generator) * 0.9 + 0.05).to(self.dtype),
        }

    def expected(
        self, x: Tensor, experts: Tensor, weights: Tensor, stacked: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """By the eager operator, in float64."""
        double = {role: value.double() for role, value in (stacked or self.stacked()).items()}
        arguments = [double.get(role) for role in ROLES]
        return torch.ops.moeify.dispatch_ffn(x.double(), experts, weights.double(), *arguments, self.activation)

    def neutral(self) -> Neutral:
        """``-dispatch(-x)``: the node's rows come from a node and are read by it alone, as in a pre-norm model."""
        dtype = TYPES[self.dtype]
        graph_inputs = [
            ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["T", self.D])),
            ir.Value(name="experts", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["T", self.K])),
            ir.Value(name="weights", type=ir.TensorType(dtype), shape=ir.Shape(["T", self.K])),
        ]
        stacked = {role: _initializer(f"experts.{role}", value) for role, value in self.stacked().items()}
        rows = ir.Node("", "Neg", [graph_inputs[0]], name="before")
        rows.outputs[0].name = "rows"
        rows.outputs[0].type, rows.outputs[0].shape = graph_inputs[0].type, graph_inputs[0].shape
        node = ir.Node(
            DOMAIN,
            "DispatchFFN",
            [rows.outputs[0], *graph_inputs[1:], *(stacked.get(role) for role in ROLES)],
            [ir.AttrString("activation", self.activation)],
            name="dispatch",
        )
        node.outputs[0].name = "dispatch"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(["T", self.O or self.D])
        after = ir.Node("", "Neg", [node.outputs[0]], name="after")
        y = after.outputs[0]
        y.name, y.type, y.shape = "y", node.outputs[0].type, node.outputs[0].shape
        graph = ir.Graph(
            graph_inputs,
            [y],
            nodes=[rows, node, after],
            initializers=list(stacked.values()),
            opset_imports={"": OPSET, DOMAIN: 1},
            name="case",
        )
        call = Call("block", 0, "rows", "experts", "weights", "dispatch", ("dispatch",))
        return Neutral(ir.Model(graph, ir_version=10), None, [call])  # type: ignore[arg-type]

    def mixture(self) -> Mixture:
        source = self.neutral()
        return mixtures.read(source.model.graph.node("dispatch"), source.calls[0])

    def lowered(self, lowering: Lowering) -> ir.Model:
        return lower(self.neutral(), lambda mixture: Choice("one", "a test"), {"one": lowering}).model

    def outputs(self, model: ir.Model, inputs: Mapping[str, Tensor]) -> Tensor:
        """What ONNX Runtime computes, checked for its file first; comparable with ``expected``."""
        return -torch.from_numpy(session(proto(model)).run(None, arrays(inputs, negated="x"))[0])


def _initializer(name: str, value: Tensor) -> ir.Value:
    tensor = ir.Tensor(array(value), dtype=TYPES[value.dtype], name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))


def array(value: Tensor) -> numpy.ndarray:
    """numpy has no bfloat16 of its own."""
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
    return value.numpy()


def arrays(inputs: Mapping[str, Tensor], negated: str | None = None) -> dict[str, numpy.ndarray]:
    return {name: array(-value if name == negated else value) for name, value in inputs.items()}


def proto(model: ir.Model) -> onnx.ModelProto:
    """Serialised, past the full checker and strict shape inference."""
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True, data_prop=True)
    return made


def session(model: onnx.ModelProto, **options: Any) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4  # refusals that tests ask for are also printed by default
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def find(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def relative(value: Tensor, expected: Tensor) -> float:
    """max abs(value - expected) / max abs(expected); NaN is as far as anything can be."""
    error = (value.double() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(float("inf")))


def scatter(made: Program) -> None:
    """Give experts and routers values far apart: copies would hide a wrong choice."""
    made.materialise()
    set_training(made.graph_module, False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in made.graph_module.named_parameters():
            if ".experts." in name or ".router." in name:
                value.normal_(0, 0.4, generator=generator)


def end_to_end(made: Program, lowering: Lowering, check: Callable[[ir.Model], None] | None = None) -> onnx.ModelProto:
    """A converted Program in ONNX, every dispatch lowered by ``lowering``."""
    from moeify.backends.onnxruntime.lowering import neutral

    result = lower(neutral(made), lambda mixture: Choice("one", "a test"), {"one": lowering})
    assert {choice.lowering for choice in result.choices} == {"one"}
    if check is not None:
        check(result.model)
    return proto(result.model)
