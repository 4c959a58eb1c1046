"""narrow-topk: a sort whose first k are read, and everything that only looks like one."""

from __future__ import annotations

import numpy
import onnx
import onnx_ir as ir
import pytest

from moeify.backends.onnxruntime.narrow_topk import narrow_topk
from tests.onnx_mixtures import find, session

BOTH = """
    values, order = TopK <axis = 1, sorted = 1> (x, all)
    best = Slice (values, zero, two, one)
    which = Slice (order, zero, two, one)
"""


def model(body: str, outputs: str = "float[T, K] best, int64[T, K] which") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    case (float[T, 6] x) => ({outputs})
    <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] all = {{6}}, int64[1] nine = {{9}}>
    {{ {body} }}"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def run(made: ir.Model, x: numpy.ndarray) -> list[numpy.ndarray]:
    proto = ir.to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    return session(proto).run(None, {"x": x})


@pytest.mark.parametrize("ties", [False, True])
def test_both_results(ties):
    x = numpy.random.default_rng(0).standard_normal((50, 6)).astype(numpy.float32)
    x = x.round() if ties else x
    before, made = run(model(BOTH), x), model(BOTH)
    assert narrow_topk(made) == 1
    assert [node.op_type for node in made.graph] == ["TopK"]
    assert [value.name for value in made.graph.outputs] == ["best", "which"]
    for a, b in zip(before, run(made, x), strict=True):
        numpy.testing.assert_array_equal(a, b)


def test_one_result_and_the_axis_from_behind():
    body = """
        values, order = TopK (x, all)
        first = Slice (order, zero, two, one, one)
        which = Identity (first)
    """
    made = model(body, "int64[T, K] which")
    assert narrow_topk(made) == 1
    assert [node.op_type for node in made.graph] == ["TopK", "Identity"]
    (which,) = run(made, numpy.array([[3, 1, 4, 1, 5, 9]], numpy.float32))
    assert which.tolist() == [[5, 4]]


@pytest.mark.parametrize(
    ("why", "body"),
    [
        ("two widths", BOTH.replace("(order, zero, two", "(order, zero, one")),
        ("not from the start", BOTH.replace("zero, two", "one, two")),
        ("another axis", BOTH.replace("two, one)", "two, zero)")),
        ("more than there is", BOTH.replace("zero, two", "zero, nine")),
        ("a step", BOTH.replace("two, one)", "two, one, two)")),
        ("not sorted", BOTH.replace("sorted = 1", "sorted = 0")),
        ("read whole", BOTH.replace("which = Slice (order, zero, two, one)", "which = Identity (order)")),
        (
            "an output",
            BOTH.replace("values, order", "values, which").replace("which = Slice (order", "w = Slice (which"),
        ),
    ],
)
def test_others_stay(why, body):
    made = model(body)
    before = ir.to_proto(made).SerializeToString()
    assert narrow_topk(made) == 0, why
    assert ir.to_proto(made).SerializeToString() == before


def test_one_value_does_not_become_two_outputs():
    body = """
        values, order = TopK <axis = 1> (x, all)
        which = Slice (order, zero, two, one)
        same = Slice (order, zero, two, one)
        best = Slice (values, zero, two, one)
    """
    made = model(body, "float[T, K] best, int64[T, K] which, int64[T, K] same")
    assert narrow_topk(made) == 0
    assert find(made, "Slice") is not None
