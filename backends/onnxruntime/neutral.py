"""A Program in ONNX, its ``moe.*`` operators still nodes of a domain of our own.

torch.onnx translates everything else. The neutral nodes have the signatures of the operators (see ``ir.ops``); a
lowering for a target replaces every one of them, and none is left in a file.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Opset

from moeify.backends.onnxruntime.naming import clear_notes, name_dimensions, name_outputs
from moeify.backends.onnxruntime.optimize import optimize
from moeify.backends.onnxruntime.rotary import widen_rotary
from moeify.backends.onnxruntime.translate import TRANSLATIONS
from moeify.errors import NotExportable
from moeify.ir.program import InputSpec

DOMAIN = "moeify"
OPSET = 23  # ONNX Runtime 1.31 fuses attention at 23, not at 20, and takes none above 26
_moe = torch.ops.moeify
_neutral = Opset(DOMAIN, 1)

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)")
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
# T is the type of activations; a trailing ? marks an optional input; int64 is spelt I.
_SCHEMAS: dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "DispatchFFN": (
        ("x T", "experts I", "weights T", "up T", "gate T?", "down T", "up_bias T?", "gate_bias T?", "down_bias T?"),
        ("y T",),
        ("activation",),
    ),
    "Experts": (
        ("rows T", "counts I", "up T", "gate T?", "down T", "up_bias T?", "gate_bias T?", "down_bias T?"),
        ("y T",),
        ("activation",),
    ),
    "GroupedLinear": (("rows T", "counts I", "weight T", "bias T?"), ("y T",), ()),
    "Permute": (("x T", "experts I"), ("rows T", "counts I", "order I"), ("num_experts",)),
    "Unpermute": (("rows T", "order I", "weights T"), ("y T",), ()),
}


def to_onnx(exported: torch.export.ExportedProgram, inputs: Sequence[InputSpec]) -> ir.Model:
    """The program in ONNX; its outputs have the names of the structure that it returns (see ``name_outputs``).

    Raises NotExportable with the first operator that torch.onnx does not translate, or that draws random numbers.
    """
    _register_schemas()
    try:
        # With gradients some of torch.onnx's traces choose another kernel of attention than others do, whose result has
        # other strides, and a view that follows fails (T5).
        with _quiet(), torch.no_grad():
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in inputs],
                custom_translation_table=_TRANSLATIONS,
                optimize=False,  # see optimize.py
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise NotExportable(
            f"torch.onnx cannot translate this program: {_cause(error)}",
            hint="the ONNX Runtime backend takes what torch.onnx takes, and the moe operators",
        ) from error
    assert result is not None
    model = result.model
    _refuse_random(model)
    optimize(model)
    clear_notes(model)
    name_dimensions(model, inputs)
    name_outputs(model, exported.call_spec.out_spec, keep=DOMAIN)
    widen_rotary(model)
    return model


def _refuse_random(model: ir.Model) -> None:
    """What they give cannot be verified, and ONNX Runtime 1.31 has no kernels for them from opset 22 on."""
    for node in model.graph.all_nodes():
        if node.op_type in _RANDOM and not node.domain:
            source = node.metadata_props.get("pkg.torch.onnx.stack_trace", "").strip().splitlines()
            raise NotExportable(
                f"the program draws random numbers in evaluation ({node.op_type})",
                where=next((line.strip() for line in reversed(source) if line.strip().startswith("File ")), None),
                hint="give the numbers as an input of the model",
            )


def _dispatch_ffn(
    x: Any, experts: Any, weights: Any, up: Any, gate: Any, down: Any, up_bias: Any, gate_bias: Any, down_bias: Any,
    activation: str,
) -> Any:  # fmt: skip
    return _neutral.DispatchFFN(
        x, experts, weights, up, gate, down, up_bias, gate_bias, down_bias, activation=activation
    )


def _experts(
    rows: Any, counts: Any, up: Any, gate: Any, down: Any, up_bias: Any, gate_bias: Any, down_bias: Any, activation: str
) -> Any:
    return _neutral.Experts(rows, counts, up, gate, down, up_bias, gate_bias, down_bias, activation=activation)


def _grouped_linear(rows: Any, counts: Any, weight: Any, bias: Any = None) -> Any:
    return _neutral.GroupedLinear(rows, counts, weight, bias)


def _permute(x: Any, experts: Any, num_experts: int) -> Any:
    return _neutral.Permute(x, experts, num_experts=num_experts)


def _unpermute(rows: Any, order: Any, weights: Any) -> Any:
    return _neutral.Unpermute(rows, order, weights)


_TRANSLATIONS: dict[Callable, Callable] = {
    _moe.dispatch_ffn.default: _dispatch_ffn,
    _moe.experts.default: _experts,
    _moe.grouped_linear.default: _grouped_linear,
    _moe.permute.default: _permute,
    _moe.unpermute.default: _unpermute,
    **TRANSLATIONS,
}


def _register_schemas() -> None:
    """The exporter refuses nodes without a schema. Schemas are global to onnx, so they are registered once."""
    if onnx.defs.has(next(iter(_SCHEMAS)), DOMAIN):
        return
    one = onnx.defs.OpSchema
    for name, (inputs, outputs, attributes) in _SCHEMAS.items():
        kinds = {"activation": one.AttrType.STRING, "num_experts": one.AttrType.INT}
        schema = one(
            name,
            DOMAIN,
            1,
            inputs=[_parameter(text) for text in inputs],
            outputs=[_parameter(text) for text in outputs],
            type_constraints=[("T", list(_FLOATS), ""), ("I", ["tensor(int64)"], "")],
            attributes=[one.Attribute(attribute, kinds[attribute], "") for attribute in attributes],
        )
        onnx.defs.register_schema(schema)


def _parameter(text: str) -> Any:
    one = onnx.defs.OpSchema
    name, kind = text.split()
    option = one.FormalParameterOption.Optional if kind.endswith("?") else one.FormalParameterOption.Single
    return one.FormalParameter(name, kind.rstrip("?"), param_option=option)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints its progress, and warns that torchvision is not there and of attributes that it made itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
