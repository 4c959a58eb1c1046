"""optimize: the numbers of the program stay, also where onnxscript takes them for zero or one."""

from __future__ import annotations

import numpy
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch

from moeify.backends.exporting import export
from moeify.backends.onnxruntime.neutral import to_onnx
from moeify.backends.onnxruntime.optimize import optimize
from tests import programs
from tests.onnx_mixtures import proto, session


class Normalised(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8)


def test_the_epsilon_of_a_normalisation_stays():
    made = programs.capture(Normalised(), torch.randn(2, 4), dynamic=(0,))
    running = session(proto(to_onnx(export(made), made.inputs)))
    x = torch.randn(3, 4) * 1e-4
    x[1] = 0
    (y,) = running.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), made.run(x))
    assert not numpy.isnan(y).any()


def model(body: str) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["": 23]> case (float[N] x) => (float[N] y) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


NEARLY = {
    "Add": "e = Constant <value_float = 1e-8> ()  y = Add (x, e)",
    "Sub": "e = Constant <value_float = 1e-9> ()  y = Sub (x, e)",
    "Mul": "e = Constant <value_float = 1.000009> ()  y = Mul (x, e)",
    "Div": "e = Constant <value_float = 1.000009> ()  y = Div (x, e)",
}


@pytest.mark.parametrize("name", NEARLY)
def test_nearly_nothing_is_not_nothing(name):
    theirs, ours = model(NEARLY[name]), model(NEARLY[name])
    onnxscript.optimizer.optimize_ir(theirs)
    assert name not in [node.op_type for node in theirs.graph], "onnxscript has mended it: use optimize=True again"
    optimize(ours)
    assert name in [node.op_type for node in ours.graph]


def test_constants_are_folded_and_the_unused_goes():
    made = model(
        "a = Constant <value_float = 2.0> ()  b = Mul (a, a)  unused = Neg (x)  y = Mul (x, b)",
    )
    optimize(made)
    assert [node.op_type for node in made.graph] == ["Mul"]
    (y,) = session(proto(made)).run(None, {"x": numpy.ones(3, numpy.float32)})
    assert y.tolist() == [4.0] * 3
