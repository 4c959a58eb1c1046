"""A dozen architectures, converted, in ONNX Runtime: other sizes than the example's, against the Program."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from moeify.backends.deploy import Choice
from moeify.backends.onnxruntime import split
from moeify.backends.onnxruntime.lowering import lower, neutral
from moeify.ir.program import InputSpec, Program, flat
from moeify.ir.recipe import Recipe
from moeify.passes.clean_up import CleanUp
from moeify.passes.find_ffn import FindFfn
from moeify.passes.make_experts import MakeExperts
from moeify.passes.route import Route
from moeify.passes.select import Select
from moeify.pipeline.base import Log
from tests.architectures import ARCHITECTURES, Architecture
from tests.onnx_mixtures import arrays, proto, relative, scatter, session

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and torch.export warn about themselves

CLOSE = 5e-6  # two layers of float32 in another order, and the runtime's own polynomials of tanh and erf
NAMES = [
    "BERT",
    "ALBERT",  # one block, called by every layer
    "LayoutLM",  # a padding mask that broadcasts
    "GPT-2",
    "Llama",  # rotary embedding
    "Falcon (parallel)",  # one head of keys
    "Phi-3 (fused gate_up)",
    "T5",  # attention bias; views of its result
    "Whisper",
    "ViT",
    "ConvNeXt",
    "Swin",
    "MLP-Mixer",
    "LSTM language model",
    "RWKV (channel mixing)",
    "BitNet (norm over the hidden width)",  # an activation without a name
]


def converted(one: Architecture) -> Program:
    made = one.program()
    values = [node.meta["val"] for node in made.graph.nodes if node.op == "placeholder"]
    made.inputs = tuple(
        InputSpec(name, x.dtype, tuple(int(s) if is_concrete_int(s) else f"d{s}" for s in value.shape))
        for name, x, value in zip(one.inputs(), made.example, values, strict=True)
    )
    made.recipe = Recipe(experts=4, top_k=2)
    for step in (FindFfn(), Select(), MakeExperts(), Route(), CleanUp()):
        step.apply(made, Log())
    scatter(made)
    return made


def grown(made: Program) -> tuple[torch.Tensor, ...]:
    """The example with every dynamic dimension repeated and one more; as it is where none is dynamic."""
    result = []
    for spec, x in zip(made.inputs, made.example, strict=True):
        for dim, size in enumerate(spec.shape):
            if isinstance(size, str):
                x = torch.cat([x, x.narrow(dim, 0, 1)], dim)
        result.append(x)
    return tuple(result)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_program(name):
    made = converted(ARCHITECTURES[name])
    assert made.converted()
    lowered = lower(neutral(made), lambda mixture: Choice("split", "a test"), {"split": split.lower})
    assert len(lowered.calls) >= len(made.converted())
    running = session(proto(lowered.model))
    for inputs in (made.example, grown(made)):
        results = running.run(None, arrays(dict(zip((spec.name for spec in made.inputs), inputs, strict=True))))
        expected = flat(made.run(*inputs))
        assert len(results) == len(expected)
        for result, value in zip(results, expected):
            assert relative(torch.from_numpy(result), value.double()) < CLOSE
