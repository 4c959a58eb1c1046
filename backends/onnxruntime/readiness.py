"""Where the CUDA provider of ONNX Runtime 1.31 will run each node of a model, found without a GPU."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import onnx_ir.passes.common as common

from moeify.backends.onnxruntime import cuda_rules, cuda_table

SHAPE_ARITHMETIC = "shape arithmetic: the runtime keeps it on the CPU"
EXPANDED = "no kernel: the runtime expands it into standard operators"
_SMALL = 100  # elements of an initializer that shape arithmetic may read
_NEVER_MOVED = {  # a node that reads one of these is no shape arithmetic
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
}


@dataclass(frozen=True)
class Placement:
    """``types`` are of the inputs, "" for those left out. ``why`` is empty for a plain node on CUDA.

    ``matters`` when the node computes something and leaves CUDA, or is taken by a kernel that cannot do it right.
    """

    node: str
    op: str
    types: tuple[str, ...]
    provider: Literal["cuda", "cpu"]
    why: str
    matters: bool


def placements(model: ir.Model) -> list[Placement]:
    """Of every node in graph order, those of subgraphs after the node that holds them.

    Follows the runtime: a kernel must exist for the version and the types of the node, a few attributes are left to
    the CPU, and what only computes on the result of Shape goes to the CPU with it. The model is not changed. What
    graph optimisations fuse or fold later is not foreseen; they only take nodes away.
    """
    twin = model.clone()
    common.InlinePass(lambda function: not _has_kernel(function.domain, function.name))(twin)
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(twin)
    return list(_of_graph(twin.graph, twin.opset_imports.get("", 1)))


def _of_graph(graph: ir.Graph, opset: int) -> Iterator[Placement]:
    nodes = [node for node in graph if not (node.op_type == "Constant" and not node.domain)]
    for node in nodes:
        _name_types(node, opset)
    refused = {node: why for node in nodes if (why := _refusal(node, opset)) is not None}
    moved, idle = _shape_arithmetic(graph, nodes, refused)
    for node in nodes:
        yield _placement(node, refused.get(node), node in moved, node in idle)
        for attribute in node.attributes.values():
            for inner in _graphs(attribute):
                yield from _of_graph(inner, opset)


def _placement(node: ir.Node, refused: str | None, moved: bool, idle: bool) -> Placement:
    types = tuple("" if value is None else _type(value) for value in node.inputs)
    name, op = node.name or "", f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    if moved or idle:
        return Placement(name, op, types, "cpu", SHAPE_ARITHMETIC, False)
    if refused is not None:
        return Placement(name, op, types, "cpu", refused, True)
    wrong = cuda_rules.misused(node)
    if wrong is not None:
        return Placement(name, op, types, "cuda", wrong, True)
    if cuda_table.is_function(node.domain, node.op_type):
        return Placement(name, op, types, "cuda", EXPANDED, False)
    mixture = node.op_type in ("MoE", "QMoE")
    return Placement(name, op, types, "cuda", cuda_rules.CAPABILITY if mixture else "", False)


def _refusal(node: ir.Node, opset: int) -> str | None:
    if cuda_table.is_function(node.domain, node.op_type):
        return None
    why = cuda_table.refusal(node.domain, node.op_type, opset, _bound(node, opset))
    return why if why is not None else cuda_rules.left_to_the_cpu(node)


def _shape_arithmetic(
    graph: ir.Graph, nodes: list[ir.Node], refused: dict[ir.Node, str]
) -> tuple[set[ir.Node], set[ir.Node]]:
    """(nodes that have a kernel and are moved, nodes without one that read only CPU values).

    The runtime's ``GetCpuPreferredNodes``: from the readers of Shape and Size on, a node moves if everything it
    reads is a CPU value, a small initializer or a graph input, and nothing of it is an input that its CUDA kernel
    reads from CPU memory anyway.
    """
    order = {node: index for index, node in enumerate(nodes)}
    on_cpu: set[ir.Value] = set()
    heap: list[int] = []

    def push_readers(values: Iterable[ir.Value]) -> None:
        for value in values:
            on_cpu.add(value)
            for use in value.uses():
                if use.node in order:
                    heapq.heappush(heap, order[use.node])

    for node in nodes:
        if node.op_type in cuda_table.SHAPE_OF and not node.domain and node not in refused:
            push_readers(node.outputs)
    inputs, visited = set(graph.inputs), set()
    moved: set[ir.Node] = set()
    idle: set[ir.Node] = set()
    while heap:
        node = nodes[heapq.heappop(heap)]
        if node in visited:
            continue
        visited.add(node)
        if node in refused:
            if all(value is None or value in on_cpu or _is_small_constant(value) for value in node.inputs):
                idle.add(node)
            push_readers(node.outputs)
            continue
        host = cuda_table.host_inputs(node.domain, node.op_type)
        if all(_may_move(value, index in host, inputs, on_cpu) for index, value in enumerate(node.inputs)):
            moved.add(node)
            push_readers(node.outputs)
    return moved, idle


def _may_move(value: ir.Value | None, host: bool, inputs: set[ir.Value], on_cpu: set[ir.Value]) -> bool:
    if value is None or value.dtype in _NEVER_MOVED:
        return False
    if value in inputs or _is_small_constant(value):
        return True
    return value in on_cpu and not host


def _is_small_constant(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size <= _SMALL


def _bound(node: ir.Node, opset: int) -> dict[str, str]:
    """Type constraints of the operator and what this node binds them to, where that is known."""
    form = cuda_table.signature(node.domain, node.op_type, opset)
    if form is None:
        return {}
    inputs = ((form.input(i), value) for i, value in enumerate(node.inputs) if value is not None)
    outputs = ((form.output(i), value) for i, value in enumerate(node.outputs))
    bound: dict[str, str] = {}
    for constraint, value in [*inputs, *outputs]:
        if (known := _type(value)) and constraint:
            bound.setdefault(constraint, known)
    return bound


def _name_types(node: ir.Node, opset: int) -> None:
    """Give outputs that shape inference left without a type that of the inputs with the same constraint."""
    form = cuda_table.signature(node.domain, node.op_type, opset)
    if form is None:
        return
    known = {form.input(i): v.type for i, v in enumerate(node.inputs) if v is not None and v.type is not None}
    for index, value in enumerate(node.outputs):
        if value.type is None:
            value.type = known.get(form.output(index))


def _type(value: ir.Value) -> str:
    """The spelling of the table: "float16", "seq(tensor(float))"; "" if not known."""
    kind = value.type
    if kind is None and value.const_value is not None:
        kind = ir.TensorType(value.const_value.dtype)
    if kind is None:
        return ""
    return str(kind.dtype).lower() if isinstance(kind, ir.TensorType) else f"seq(tensor({str(kind.dtype).lower()}))"


def _has_kernel(domain: str, op_type: str) -> bool:
    return cuda_table.entry(domain, op_type) is not None


def _graphs(attribute: ir.Attr) -> Iterator[ir.Graph]:
    if attribute.is_ref():
        return
    if attribute.type == ir.AttributeType.GRAPH:
        yield attribute.as_graph()
    elif attribute.type == ir.AttributeType.GRAPHS:
        yield from attribute.as_graphs()
