"""TVM libraries for CUDA: compiled by nvcc where a GPU is, run on it, and held against the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moeify
from moeify.api.export import export_file
from moeify.backends.tvm import load
from moeify.backends.tvm.backend import Tvm
from moeify.ir.program import flat
from tests.gpu import GPU, needs_gpu, relative
from tests.tvm_cuda import needs_nvcc

pytestmark = [needs_gpu, needs_nvcc]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, each block of four experts that differ."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=256,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder / "dense")
    recipe = moeify.Recipe(method="split-random", experts=4, top_k=2)
    moeify.convert_file(folder / "dense", folder / "moe.pt2", recipe)
    return folder / "moe.pt2"


# float32: sums in another order. float16: a few roundings a layer, and tokens whose experts are nearly equal.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 2e-2)])
def test_it_computes_what_the_program_does(moe: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    major, minor = torch.cuda.get_device_capability()
    report = export_file(moe, tmp_path / "out", Tvm(target="cuda", arch=f"sm_{major}{minor}", dtype=dtype))
    assert report.provider == "cuda"
    compiled, program = load(tmp_path / "out", "cuda"), moeify.load(moe)
    for batch, length in ((1, 1), (2, 7), (3, 128)):
        ids = torch.randint(100, (batch, length))
        given = dict.fromkeys(compiled.input_names, torch.ones_like(ids)) | {"input_ids": ids}
        with torch.no_grad():
            right = program(**given)
        right = flat(right)[0]
        made = compiled.run(given)[0]
        assert made.device.type == "cpu"
        assert relative(made, right) < tolerance
        there = compiled.run({name: value.to(GPU) for name, value in given.items()})[0]
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), made)
