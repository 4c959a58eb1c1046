"""widen-rotary: what onnxscript's fusion leaves is refused by the runtime, and what the pass makes of it is not."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch

from moeify.backends.onnxruntime.rotary import widen_rotary
from tests.onnx_mixtures import arrays, proto, session

H, D = 2, 8


def model(batch: str) -> ir.Model:
    """Two rotations by the same tables of a batch size, as in queries and keys."""
    states, tables = f"float[B, {H}, S, {D}]", f"float[{batch}, S, {D // 2}]"
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    case ({states} q, {states} k, {tables} cos, {tables} sin) => ({states} y, {states} z)
    {{
        y = RotaryEmbedding <num_heads = {H}> (q, cos, sin)
        z = RotaryEmbedding <num_heads = {H}> (k, cos, sin)
    }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def inputs(batch: int, length: int, tables: int = 1) -> dict[str, torch.Tensor]:
    angles = torch.randn(tables, length, D // 2)
    states = torch.randn(2, batch, H, length, D)
    return {"q": states[0], "k": states[1], "cos": angles.cos(), "sin": angles.sin()}


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = (torch.cat([table, table], -1).unsqueeze(1) for table in (cos, sin))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def test_without_it_the_runtime_refuses():
    with pytest.raises(Exception, match="expected to have the same shape"):
        session(proto(model("1"))).run(None, arrays(inputs(3, 5)))


def test_tables_of_one_batch_row():
    made = model("1")
    assert widen_rotary(made) == 2
    assert [node.op_type for node in made.graph].count("Expand") == 2  # each table once for both
    assert [value.name for value in made.graph.outputs] == ["y", "z"]
    running = session(proto(made))
    for batch, length in ((3, 5), (1, 1), (4, 2)):
        given = inputs(batch, length)
        y, z = running.run(None, arrays(given))
        torch.testing.assert_close(torch.from_numpy(y), rotated(given["q"], given["cos"], given["sin"]))
        torch.testing.assert_close(torch.from_numpy(z), rotated(given["k"], given["cos"], given["sin"]))


def test_tables_of_the_same_batch_stay():
    made = model("B")
    before = ir.to_proto(made).SerializeToString()
    assert widen_rotary(made) == 0
    assert ir.to_proto(made).SerializeToString() == before
    given = inputs(3, 5, tables=3)
    y, _ = session(proto(made)).run(None, arrays(given))
    torch.testing.assert_close(torch.from_numpy(y), rotated(given["q"], given["cos"], given["sin"]))
