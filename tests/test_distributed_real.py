"""A class of transformers on ranks: converted, written, read on every rank, sharded by bind, and trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moeify
from tests import rank_work, ranks, sharded, small_llama

SIZE = 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers as a converted ``.pt2``."""
    folder = tmp_path_factory.mktemp("llama")
    dense = small_llama.saved(folder / "dense", vocab_size=64, intermediate_size=40)
    moeify.convert_file(dense, folder / "llama.pt2", moeify.Recipe(experts=4, top_k=2))
    return folder / "llama.pt2"


def test_five_steps(file: Path, tmp_path: Path) -> None:
    weights, losses = rank_work.language_model_alone(file, SIZE)
    outcomes = ranks.results(ranks.run(rank_work.language_model, SIZE, tmp_path, file))
    assert losses[-1] < losses[0]
    assert torch.tensor([own for _, own in outcomes]).mean(0).tolist() == pytest.approx(losses, rel=1e-6)
    experts = {name for name in weights if ".experts." in name}
    assert len(experts) == 6
    for rank, (got, _) in enumerate(outcomes):
        assert got.keys() == weights.keys()
        for name, whole in weights.items():
            want = whole[2 * rank : 2 * rank + 2] if name in experts else whole
            assert sharded.relative(got[name], want) <= 1e-5, name  # the bar of expert parallelism
