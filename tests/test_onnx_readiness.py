"""Which nodes leave the CUDA provider: the cases below were compared with where ONNX Runtime 1.31 itself puts them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy
import onnx_ir as ir
import pytest

from moeify.backends.onnxruntime import cuda_table
from moeify.backends.onnxruntime.readiness import EXPANDED, SHAPE_ARITHMETIC, Placement, placements

F32, F16, BF16, F64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE
I64, I32, BOOL, U8 = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.UINT8


def value(name: str, dtype: ir.DataType, shape: Sequence[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def weight(name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    made = value(name, dtype, shape)
    made.const_value = ir.Tensor(numpy.zeros(shape, dtype=dtype.numpy()), dtype=dtype, name=name)
    return made


class Graph:
    """A graph made node by node; values without a const_value that nothing makes are its inputs."""

    def __init__(self, opset: int = 23) -> None:
        self.opset = opset
        self.nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any) -> ir.Node:
        made = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs, name=f"n{len(self.nodes)}.{op}")
        for index, output in enumerate(made.outputs):
            output.name = f"{made.name}.{index}"
        self.nodes.append(made)
        return made

    def model(self) -> ir.Model:
        read = list(dict.fromkeys(v for node in self.nodes for v in node.inputs if v is not None and not v.producer()))
        graph = ir.Graph(
            [v for v in read if v.const_value is None],
            self.nodes[-1].outputs,
            nodes=self.nodes,
            initializers=[v for v in read if v.const_value is not None],
            opset_imports={"": self.opset, "com.microsoft": 1},
            name="g",
        )
        return ir.Model(graph, ir_version=10)

    def placed(self) -> list[Placement]:
        return placements(self.model())


def one(op: str, *inputs: ir.Value | None, opset: int = 23, **attributes: Any) -> Placement:
    graph = Graph(opset)
    graph.add(op, *inputs, **attributes)
    (found,) = graph.placed()
    return found


x = functools.partial(value, "x")


# --- versions and types -------------------------------------------------------------------------------------------


def test_what_cuda_takes_has_no_remark() -> None:
    found = one("MatMul", x(BF16, ["n", 8]), weight("w", BF16, [8, 4]))
    assert found == Placement("n0.MatMul", "MatMul", ("bfloat16", "bfloat16"), "cuda", "", False)


@pytest.mark.parametrize(("opset", "provider"), [(21, "cuda"), (23, "cpu")])
@pytest.mark.parametrize("op", ["MaxPool", "Elu", "Dropout"])
def test_kernels_that_were_not_moved_to_a_newer_version_are_not_used(op: str, opset: int, provider: str) -> None:
    """A kernel without a last version is for its first one alone. As seen in the runtime at both opsets."""
    attributes = {"kernel_shape": [2, 2]} if op == "MaxPool" else {}
    found = one(op, x(F32, ["n", 3, 8, 8]), opset=opset, **attributes)
    assert (found.provider, found.matters) == (provider, provider == "cpu")
    if provider == "cpu":
        assert found.why.startswith(f"the CUDA provider has {op}-")
        assert found.why.endswith(f"opset 23 has {op}-22")


@pytest.mark.parametrize(
    ("op", "dtype", "why"),
    [
        ("ArgMax", BF16, "the CUDA kernel of ArgMax takes no bfloat16, only double, float, float16"),
        ("LSTM", BF16, "the CUDA kernel of LSTM takes no bfloat16, only double, float, float16"),
        ("Mod", F64, None),
        ("DFT", F32, "the CUDA provider has no kernel for DFT"),
    ],
)  # fmt: skip
def test_types_that_fall_to_the_cpu(op: str, dtype: ir.DataType, why: str | None) -> None:
    inputs: dict[str, list[ir.Value | None]] = {
        "ArgMax": [x(dtype, ["n", 8])],
        "LSTM": [x(dtype, [4, 2, 8]), weight("w", dtype, [1, 32, 8]), weight("r", dtype, [1, 32, 8])],
        "Mod": [x(dtype, [4]), value("b", dtype, [4])],
        "DFT": [x(dtype, [1, 8, 1])],
    }
    found = one(op, *inputs[op], **({"fmod": 1} if op == "Mod" else {}))
    assert (found.provider, found.why, found.matters) == ("cuda" if why is None else "cpu", why or "", why is not None)


def test_types_that_each_fit_but_not_together() -> None:
    found = one("Attention", *(value(n, F16, ["b", 2, "s", 8]) for n in "qkv"), value("m", F32, ["s", "s"]))
    assert found.provider == "cpu"
    assert (
        found.why == "the CUDA provider has no kernel of Attention for T1 = float16, T2 = float16, U = float together"
    )


def test_types_are_found_through_nodes_that_shape_inference_does_not_know() -> None:
    graph = Graph()
    made = graph.add("QuickGelu", x(BF16, ["n", 8]), domain="com.microsoft")
    graph.add("TopK", made.outputs[0], weight("k", I64, [1]), outputs=2)
    gelu, topk = graph.placed()
    assert (gelu.provider, topk.provider) == ("cuda", "cpu")


def test_a_function_of_onnx_is_expanded_by_the_runtime() -> None:
    found = one("Mish", x(F32, ["n"]))
    assert (found.provider, found.why, found.matters) == ("cuda", EXPANDED, False)


def test_an_unknown_operator_is_named_with_its_domain() -> None:
    found = one("Experts", x(F32, ["n"]), domain="com.microsoft")
    assert found.why == "the CUDA provider has no kernel for com.microsoft::Experts"


def test_model_local_functions_are_looked_into_unless_a_kernel_has_their_name() -> None:
    def model(name: str) -> ir.Model:
        graph = Graph()
        made = x(F32, ["n", 8])
        if name == "MoE":
            inputs = [
                made,
                value("r", F32, ["n", 4]),
                weight("a", F32, [4, 16, 16]),
                None,
                weight("b", F32, [4, 16, 16]),
            ]
            graph.add(name, *inputs, domain="com.microsoft", normalize_routing_weights=1)
        else:
            graph.add(name, made, domain="com.microsoft")
        whole = graph.model()
        formals = [ir.Value(name=f"a{i}") for i in range(len(graph.nodes[0].inputs))]
        body = ir.node("Elu", formals[:1], name="inner")
        inner = ir.Graph(formals, body.outputs, nodes=[body], opset_imports={"": 23}, name="body")
        function = ir.Function("com.microsoft", name, "", graph=inner, attributes=[])
        whole.functions[function.identifier()] = function
        return whole

    assert [p.op for p in placements(model("MoE"))] == ["com.microsoft::MoE"]
    (found,) = placements(model("Mine"))
    assert (found.op, found.provider) == ("Elu", "cpu")


def test_constants_are_no_nodes_and_the_model_stays_as_it_is() -> None:
    graph = Graph()
    constant = graph.add("Constant", value_float=1.0)
    graph.add("Add", x(F32, ["n"]), constant.outputs[0])
    model = graph.model()
    before = ir.to_proto(model).SerializeToString()
    (found,) = placements(model)
    assert found.op == "Add"
    assert ir.to_proto(model).SerializeToString() == before


# --- shape arithmetic ---------------------------------------------------------------------------------------------


def shaped(dtype: ir.DataType = F32) -> tuple[Graph, ir.Value, ir.Value]:
    graph, rows = Graph(), x(dtype, ["n", "s", 8])
    return graph, rows, graph.add("Shape", rows).outputs[0]


def test_shape_arithmetic_goes_to_the_cpu_and_does_not_matter() -> None:
    graph, rows, shape = shaped()
    first = graph.add("Gather", shape, weight("zero", I64, [1]))
    joined = graph.add("Concat", first.outputs[0], weight("rest", I64, [1]), axis=0)
    graph.add("Reshape", rows, joined.outputs[0])
    found = graph.placed()
    assert [p.provider for p in found] == ["cuda", "cpu", "cpu", "cuda"]
    assert {(p.why, p.matters) for p in found[1:3]} == {(SHAPE_ARITHMETIC, False)}


def test_a_kernel_that_reads_the_shape_from_cpu_memory_stays() -> None:
    for op, extra in (("Expand", []), ("Tile", []), ("ConstantOfShape", None)):
        graph, rows, shape = shaped()
        graph.add(op, *([shape] if extra is None else [rows, shape, *extra]))
        assert [p.provider for p in graph.placed()] == ["cuda", "cuda"], op


def test_a_large_initializer_keeps_a_node_on_cuda() -> None:
    for size, provider in ((100, "cpu"), (101, "cuda")):
        graph, _, shape = shaped()
        graph.add("Gather", weight("table", F32, [size]), shape)
        assert graph.placed()[1].provider == provider


def test_half_precision_is_never_moved() -> None:
    graph, _, shape = shaped()
    graph.add("Gather", weight("table", F16, [4]), shape)
    assert graph.placed()[1].provider == "cuda"


def test_shape_arithmetic_without_a_kernel_does_not_matter_either() -> None:
    graph, _, shape = shaped()
    graph.add("BitwiseAnd", shape, weight("mask", I64, [3]))
    found = graph.placed()[1]
    assert (found.provider, found.why, found.matters) == ("cpu", SHAPE_ARITHMETIC, False)


def test_the_same_node_on_tokens_matters() -> None:
    found = one("BitwiseAnd", x(I64, ["n"]), value("b", I64, ["n"]))
    assert (found.provider, found.matters) == ("cpu", True)


def test_subgraphs_are_looked_into() -> None:
    rows = x(F32, ["n"])
    inner = [ir.node("Elu", [rows], name="elu"), ir.node("Relu", [rows], name="relu")]
    for node in inner:
        node.outputs[0].name = f"{node.name}.0"
    branches = [ir.Graph([], node.outputs, nodes=[node], name=node.name) for node in inner]
    graph = Graph()
    shape = graph.add("Abs", rows)
    graph.add("If", value("c", BOOL, []), then_branch=branches[0], else_branch=branches[1])
    del shape
    assert {p.node: p.provider for p in graph.placed()} == {
        "n0.Abs": "cuda", "n1.If": "cuda", "elu": "cpu", "relu": "cuda"
    }  # fmt: skip


def test_every_row_of_the_table_can_be_read() -> None:
    types = {t for t in dir(ir.DataType) if t.isupper()}
    for name, known in cuda_table.table()["operators"].items():
        domain, _, op = name.rpartition("::")
        assert domain or cuda_table.signature("", op, 26) or op == "SimplifiedLayerNormalization", name
        for first, last, variants in known["kernels"]:
            assert last is None or first <= last
            constraints = set(variants[0])
            for variant in variants:
                assert set(variant) == constraints, name
                for text in variant.values():
                    for one_type in cuda_table._allowed(text):
                        bare = one_type.removeprefix("seq(tensor(").rstrip(")").upper()
                        assert bare in types, (name, one_type)


def test_the_table_says_where_it_comes_from() -> None:
    assert "1.31.1" in cuda_table.table()["source"]
