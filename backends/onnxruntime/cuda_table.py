"""Which nodes the CUDA provider of ONNX Runtime has a kernel for: a table of its operators, versions and types.

``cuda_kernels.json`` is the provider's own kernel registry (``get_all_opkernel_def`` of onnxruntime-gpu 1.31.1), cut to
what an exported network can hold; the project's docs/OperatorKernels.md is made from the same registry. Of an operator
it holds ``kernels``, rows of [first version, last version or null, variants]: a variant maps a type constraint to the
types it takes; ``host``, the inputs that the kernel reads from CPU memory; and, for operators outside ONNX,
``signature``, the constraints of inputs and outputs. ``functions`` are the operators without a kernel of any provider,
which the runtime expands into others.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import onnx

SHAPE_OF = ("Shape", "Size")  # the kernels whose result lies in CPU memory


@dataclass(frozen=True)
class Signature:
    """Type constraints of inputs and outputs in order; the last one repeats for variadic operators."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    since: int

    def input(self, index: int) -> str:
        return self.inputs[min(index, len(self.inputs) - 1)] if self.inputs else ""

    def output(self, index: int) -> str:
        return self.outputs[min(index, len(self.outputs) - 1)] if self.outputs else ""


@functools.cache
def table() -> Mapping[str, Any]:
    return json.loads(resources.files(__package__).joinpath("cuda_kernels.json").read_text(encoding="ascii"))


def entry(domain: str, op_type: str) -> Mapping[str, Any] | None:
    operators: Mapping[str, Any] = table()["operators"]
    return operators.get(f"{domain}::{op_type}" if domain else op_type)


def host_inputs(domain: str, op_type: str) -> frozenset[int]:
    """The inputs that the CUDA kernel reads from CPU memory."""
    return frozenset((entry(domain, op_type) or {}).get("host", ()))


def is_function(domain: str, op_type: str) -> bool:
    """The runtime has no kernel for it and puts the nodes that define it in its place."""
    return not domain and op_type in table()["functions"]


@functools.cache
def signature(domain: str, op_type: str, opset: int) -> Signature | None:
    """None for an operator that neither ONNX at this opset nor the table knows."""
    if not domain:
        try:
            schema = onnx.defs.get_schema(op_type, opset, "")
        except onnx.defs.SchemaError:
            return None
        inputs, outputs = (tuple(p.type_str for p in side) for side in (schema.inputs, schema.outputs))
        return Signature(inputs, outputs, schema.since_version)
    known = entry(domain, op_type)
    if known is None:
        return None
    inputs, outputs = (tuple(side) for side in known["signature"])
    return Signature(inputs, outputs, 1)


def refusal(domain: str, op_type: str, opset: int, types: Mapping[str, str]) -> str | None:
    """Why no kernel takes a node whose type constraints are bound to ``types`` ("float16", ...); None if one does.

    A constraint that is not in ``types`` is taken to fit.
    """
    known, form = entry(domain, op_type), signature(domain, op_type, opset)
    if known is None or form is None:
        return f"the CUDA provider has no kernel for {domain + '::' if domain else ''}{op_type}"
    rows = [row for row in known["kernels"] if _reaches(row, form.since)]
    if not rows:
        newest = max(row[0] for row in known["kernels"])
        return f"the CUDA provider has {op_type}-{newest}, and opset {opset} has {op_type}-{form.since}"
    misses = [_miss(variant, types) for _, _, variants in rows for variant in variants]
    if any(miss is None for miss in misses):
        return None
    return _explain(op_type, types, [variant for _, _, variants in rows for variant in variants])


def _reaches(row: Sequence[Any], since: int) -> bool:
    """The runtime's rule: a kernel without a last version is for its first version alone."""
    first, last, _ = row
    return first == since or (last is not None and first < since <= last)


def _miss(variant: Mapping[str, str], types: Mapping[str, str]) -> str | None:
    """The first constraint that the variant does not take."""
    return next(
        (name for name, bound in types.items() if name in variant and bound not in _allowed(variant[name])), None
    )


def _allowed(text: str) -> list[str]:
    return str(table()["type sets"].get(text, text)).split(" ")


def _explain(op_type: str, types: Mapping[str, str], variants: Sequence[Mapping[str, str]]) -> str:
    for name, bound in types.items():
        takes = sorted({t for variant in variants if name in variant for t in _allowed(variant[name])})
        if takes and bound not in takes:
            return f"the CUDA kernel of {op_type} takes no {bound}, only {', '.join(takes)}"
    bound_types = ", ".join(f"{name} = {bound}" for name, bound in types.items())
    return f"the CUDA provider has no kernel of {op_type} for {bound_types} together"
