"""Examples of mixed lengths: what is padded is neither learnt from nor measured on, and dropout can be left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import moeify
from moeify import Recipe
from moeify.api.train_report import TrainReport

VOCABULARY, LENGTHS, LONGEST = 32, (3, 5, 8, 4), 8


@pytest.fixture(scope="module")
def dense() -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


@pytest.fixture(scope="module")
def noisy(dense: transformers.BertModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose experts are not the dense block, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("padding")
    dense.save_pretrained(folder / "dense")
    inputs = ["input_ids=int64[batch=2,seq=8]{below=32}", "attention_mask=int64[batch=2,seq=8]{below=2}"]
    recipe = Recipe(method="noise{std=0.5}", experts=4, top_k=2)
    moeify.convert_file(folder / "dense", folder / "noisy.pt2", recipe, inputs=inputs)
    return folder / "noisy.pt2"


def texts(width: int, *, masked: bool = True) -> dict[str, Tensor]:
    """The same texts, padded to a width with other tokens each time."""
    draw = torch.Generator().manual_seed(0)
    real = [torch.randint(VOCABULARY, (length,), generator=draw) for length in LENGTHS]
    ids = torch.randint(VOCABULARY, (len(real), width), generator=torch.Generator().manual_seed(width))
    mask = torch.zeros_like(ids)
    for row, text in enumerate(real):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask if masked else torch.ones_like(mask)}


def train(model: Path, dense: transformers.BertModel, data: dict[str, Tensor], **options) -> TrainReport:
    wanted = {
        "steps": 2,
        "batch": len(LENGTHS),
        "lr": 1e-2,
        "warmup": 0,
        "distill": "cosine",
        "only": "ffn",
        "test": data,
        **options,
    }
    return moeify.train(model, data, teacher=dense, **wanted)


@pytest.fixture(scope="module")
def short(noisy: Path, dense: transformers.BertModel) -> TrainReport:
    """Trained on texts as long as the longest, without dropout."""
    return train(noisy, dense, texts(LONGEST), dropout=False)


def test_padding_changes_nothing(noisy: Path, dense: transformers.BertModel, short: TrainReport) -> None:
    long, unmasked = (train(noisy, dense, texts(LONGEST + 4, masked=masked), dropout=False) for masked in (True, False))
    # Sums over more columns, all zero, are taken in another order.
    assert long.run.losses == pytest.approx(short.run.losses, rel=1e-5)
    for name, value in short.module.state_dict().items():
        torch.testing.assert_close(long.module.state_dict()[name], value, rtol=1e-4, atol=1e-5)  # Adam divides by ~0
    assert unmasked.run.losses[0] != pytest.approx(short.run.losses[0], rel=1e-2)
    for first, second in zip(short.held_out, long.held_out, strict=True):
        figures = [[one.cosine for one in found.against_teacher] for found in (first, second)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_dropout_can_be_left_out(noisy: Path, dense: transformers.BertModel, short: TrainReport) -> None:
    """The first loss is then that of the model in evaluation."""
    expected = sum(1 - (one.cosine or 0.0) for one in short.held_out[0].against_teacher)
    assert short.run.losses[0] == pytest.approx(expected, rel=1e-4)
    assert train(noisy, dense, texts(LONGEST), steps=1).run.losses[0] != pytest.approx(expected, rel=1e-2)
