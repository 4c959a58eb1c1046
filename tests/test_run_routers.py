"""Router losses and updates in ``python -m moeify.run``: the same on any number of ranks as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeify
from tests import runs, small_llama

LOSSES = ("switch", "z{weight=0.1}", "importance")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with a sigmoid-bias router, and padded data."""
    folder = tmp_path_factory.mktemp("llama")
    dense = small_llama.saved(folder / "dense", intermediate_size=24, num_hidden_layers=1)
    recipe = moeify.Recipe(experts=4, top_k=2, router="sigmoid-bias{gamma=0.01}", router_losses=LOSSES)
    moeify.convert_file(dense, folder / "llama.pt2", recipe)
    ids = torch.randint(8, 128, (10, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[3, 4:] = mask[7, 1:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, folder / "data.safetensors")
    return folder / "llama.pt2"


def test_losses_and_biases_do_not_depend_on_the_ranks(model: Path, tmp_path: Path) -> None:
    """Three examples a step: one rank of two has one of them, and padding is nobody's. An odd number of steps
    leaves no bias where it began."""
    said, weights = {}, {}
    for size in (1, 2):
        written = tmp_path / f"{size}.safetensors"
        arguments = ["--data", model.parent / "data.safetensors", "--steps", 5, "--batch", 3, "--lr", 1e-2]
        kept = ["--checkpoints", tmp_path / f"c{size}", "--write", written, "--json"]
        ended = runs.run(size, tmp_path / str(size), model, *arguments, *kept)
        assert [one.code for one in ended] == [0] * size, ended[0].err
        said[size], weights[size] = ended[0].json(), load_file(written)
    assert list(said[1]["router_losses"]) == ["switch", "z", "importance"]
    for name, values in said[1]["router_losses"].items():
        assert len(values) == 5
        assert values == pytest.approx(said[2]["router_losses"][name], rel=1e-4), name
    assert said[1]["gradient_norms"] == pytest.approx(said[2]["gradient_norms"], rel=1e-4)
    biases = [name for name in weights[1] if name.endswith("router.bias")]
    assert len(biases) == 1
    for name in biases:
        assert weights[1][name].abs().max() >= 0.01
        torch.testing.assert_close(weights[1][name], weights[2][name])
