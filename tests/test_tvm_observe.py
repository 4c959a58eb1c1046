"""What each call of a block computed, read off the deployed library before its memory is used again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tvm import relax, tirx

from moeify.backends.calls import Call
from moeify.backends.tvm import load, observe
from moeify.backends.tvm.cpu import pipeline
from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.emitter import Emitter
from moeify.backends.tvm.families import Experts
from moeify.backends.tvm.linking import linker
from moeify.backends.tvm.loader import Compiled
from moeify.backends.tvm.machine import machine
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weights
from moeify.errors import BrokenProgram
from tests.tvm_libraries import Library

D, F, E, K = 40, 40, 4, 2
CALLS = [Call(block, number, "", "", "", "", ()) for block, number in (("a", 0), ("a", 1), ("b", 0))]
NAMES = [call.name for call in CALLS]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Three calls, each of the result of the one before: twice the fused kernels, then permute and unpermute.

    Outputs: the three results.
    """
    draw = torch.Generator().manual_seed(0)
    values = {"up": torch.randn(E, F, D, generator=draw), "down": torch.randn(E, D, F, generator=draw)}
    target, families = machine(), table()
    weights = Weights(values.__getitem__)
    rows = tirx.Var("rows", "int64")
    x = relax.Var("x", tensor_type((rows, D), "float32"))
    experts = relax.Var("experts", tensor_type((rows, K), "int64"))
    scores = relax.Var("scores", tensor_type((rows, K), "float32"))
    builder = relax.BlockBuilder()
    emitter = Emitter(builder, target, weights)
    spec = Experts("up", None, "down", None, None, None, "relu", E, D, F, D)
    with builder.function("main"):
        with builder.dataflow():
            first = families("dispatch_ffn", emitter, x, experts, scores, spec)
            second = families("dispatch_ffn", emitter, first, experts, scores, spec)
            made = families("permute", emitter, second, experts, E)
            sorted_rows, order = emitter.emit(made[0]), emitter.emit(made[2])
            third = families("unpermute", emitter, sorted_rows, order, scores)
            results = [builder.emit_output(value) for value in (first, second, third)]
        builder.emit_func_output(relax.Tuple(results), params=[x, experts, scores, *(weight.var for weight in weights)])
    shapes = {"x": ("float32", ["rows", D]), "experts": ("int64", ["rows", K]), "scores": ("float32", ["rows", K])}
    header = {
        "format": 1,
        "inputs": [{"name": name, "dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()],
        "outputs": [{"dtype": "float32", "shape": ["rows", D]}] * 3,
        "weights": [weight.name for weight in weights],
        "target": target.text,
        "device": "cpu",
        "needs": {"apache-tvm": "0.27.0"},
    }
    module = builder.finalize()
    folder: Path = tmp_path_factory.mktemp("observe") / "out"
    Library(pipeline.compile(module, target), weights, header, linker(target)).write(folder)
    return load(folder)


def inputs(count: int) -> list[torch.Tensor]:
    return [torch.randn(count, D), torch.randint(E, (count, K)), torch.rand(count, K)]


@pytest.mark.parametrize("count", [1, 7])
def test_each_call_is_seen_with_its_own_rows_experts_and_result(compiled: Compiled, count: int) -> None:
    given = inputs(count)
    results = compiled.run(given)
    seen = observe.seen(compiled, CALLS, given)
    assert list(seen) == NAMES
    rows = [given[0], results[0], results[1]]
    for name, row, result in zip(NAMES, rows, results):
        assert torch.equal(seen[name].rows, row)
        assert torch.equal(seen[name].experts, given[1])
        assert torch.equal(seen[name].output, result)
    assert not torch.equal(results[0], results[1])


def test_watching_ends(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy = observe._copy
    monkeypatch.setattr(observe, "_copy", lambda tensor: (copies.append(1), copy(tensor))[1])
    given = inputs(3)
    observe.seen(compiled, CALLS, given)
    assert len(copies) == 3 * len(CALLS)
    compiled.run(given)
    assert len(copies) == 3 * len(CALLS)


def test_a_library_with_other_calls_is_refused(compiled: Compiled) -> None:
    with pytest.raises(BrokenProgram, match="the library makes 3 calls of blocks, the program 2"):
        observe.seen(compiled, CALLS[:2], inputs(3))


def test_kernels_that_show_too_little_are_refused(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_LAST", ("moe_down_",))
    with pytest.raises(BrokenProgram, match="the kernels of b do not show its rows, its experts and its result"):
        observe.seen(compiled, CALLS, inputs(3))
