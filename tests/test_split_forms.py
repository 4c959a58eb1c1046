"""A split block in every form it has: graph, module, checkpoint folder, archive, and lowered."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import moeify
from moeify import Recipe, surgery
from moeify.api import convert_file
from moeify.api.export import export_file
from moeify.api.progress import Silent
from moeify.backends import BACKENDS
from moeify.errors import Refused, VerificationFailed
from moeify.pipeline.default import REWRITE
from moeify.pipeline.runner import run
from tests import profiles
from tests.surgery_models import case, output

SPEC = ["float32[batch=2,seq=4,16]"]
RECIPES = [
    {"method": "carve", "shared": 1},
    {"method": "carve{compensate=false}", "shared": 1, "router": "topk{score=mlp}"},
    {"method": "split-kmeans", "router": "topk{score=neuron,representatives=2}"},
]


def forms(name: str, recipe: dict):
    """(graph form, module form) of one model, made on their own from the dense weights."""
    made = case(name)
    program = made.program.clone()
    program.recipe = Recipe(**{"experts": 4, **recipe})
    profiles.profiled(program)
    module = surgery.apply(made.dense, program, in_place=False)
    run(program, REWRITE)
    program.materialise()
    return made, program, module


NAMED = ("gpt2", "llama", "encoder")
POSSIBLE = [(n, r) for n in (*NAMED, "custom", "convolution") for r in RECIPES if n in NAMED or "router" not in r]


@pytest.mark.parametrize(("name", "recipe"), POSSIBLE, ids=str)
def test_module_form_is_graph_form(name, recipe):
    made, program, module = forms(name, recipe)
    graph, state = program.graph_module.state_dict(), module.state_dict()
    new = {key for key in graph if any(f".{part}" in key for part in ("experts.", "router.", "shared.", "output_b"))}
    assert new == set(state) - set(made.dense.state_dict())
    assert all(torch.equal(graph[key], state[key]) for key in new)
    result = program.run(*made.program.example)
    expected = next(iter(result.values())) if isinstance(result, dict) else result
    got = output(module, dict(zip(made.inputs, made.program.example)))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(got, output(made.dense, dict(zip(made.inputs, made.program.example))))


def test_values_of_the_program_are_taken_over_fitted_routers_too():
    made = case("encoder")
    program = made.program.clone()
    program.recipe = Recipe(experts=4, method="split-random")
    run(program, REWRITE)
    program.materialise()
    name = f"{program.converted()[0].anchor}.router.bias"
    program.set_parameter(name, torch.arange(4.0))
    module = surgery.apply(made.dense, program, in_place=False)
    assert torch.equal(module.get_parameter(name), torch.arange(4.0))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_checkpoint_folder_gives_the_model_back(recipe, tmp_path):
    made, _, module = forms("gpt2", recipe)
    surgery.save(module, tmp_path / "out")
    again = surgery.load(tmp_path / "out")
    assert torch.equal(output(again, made.inputs), output(module, made.inputs))
    assert torch.equal(output(pickle.loads(pickle.dumps(again)), made.inputs), output(module, made.inputs))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    path = tmp_path_factory.mktemp("models") / "dense.pt"
    torch.save(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), path)
    return path


def test_report(dense, tmp_path):
    recipe = Recipe(method="split-random", experts=3, shared=1, top_k=2)
    report = convert_file(dense, tmp_path / "o.pt2", recipe, inputs=SPEC)
    (block,) = report.blocks
    assert (block.router, block.exact, block.d_expert, block.active_share) == ("topk", False, 8, 0.75)
    assert 0 <= block.all_on_error <= 1e-5 < block.relative_error
    loaded = moeify.load(tmp_path / "o.pt2")
    assert loaded.moeify_report.blocks[0].all_on_error == block.all_on_error


def test_all_experts_on_by_recipe_is_exact(dense):
    report = convert_file(dense, None, Recipe(method="split-kmeans", experts=4, top_k=4), inputs=SPEC)
    assert report.blocks[0].exact
    assert report.verified
    assert report.max_relative_error <= 1e-5


def test_methods_that_do_not_split_have_no_such_error(dense):
    (block,) = convert_file(dense, None, Recipe(experts=4), inputs=SPEC).blocks
    assert (block.all_on_error, block.active_share) == (None, 2.0)


def test_a_split_that_loses_something_is_not_written(dense, tmp_path, monkeypatch):
    materialise = moeify.ir.program.Program.materialise

    def lose(program, done=None):
        materialise(program, done)
        for name, value in program.graph_module.named_parameters():
            if name.endswith("experts.up"):
                value.data[0, 0] = 0

    monkeypatch.setattr(moeify.ir.program.Program, "materialise", lose)
    with pytest.raises(VerificationFailed, match=r"^the experts of split-random, all on, are not the dense block: the"):
        convert_file(dense, tmp_path / "o.pt2", Recipe(method="split-random", experts=4), inputs=SPEC)
    assert not (tmp_path / "o.pt2").exists()


class Stages(Silent):
    """Remembers what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def stage(self, text: str, total: int | None = None) -> None:
        self.begun.append(text)


def test_a_method_that_needs_data_says_so_before_anything_is_rewritten(dense):
    stages = Stages()
    with pytest.raises(Refused, match=r"^carve needs statistics of the hidden units, and no data were given"):
        convert_file(dense, None, Recipe(method="carve", experts=4), inputs=SPEC, progress=stages)
    assert "rewriting" not in stages.begun


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_lowered(dense, tmp_path, backend):
    recipe = Recipe(method="split-random", experts=3, shared=1, top_k=2, router="topk{score=neuron}")
    convert_file(dense, tmp_path / "o.pt2", recipe, inputs=SPEC)
    suffix = ".onnx" if backend == "onnxruntime" else ""
    report = export_file(tmp_path / "o.pt2", tmp_path / f"o{suffix}", BACKENDS.parse(backend))
    assert report.blocks[0].relative_error <= 1e-4  # the tolerance of export_file in float32
