"""all-MiniLM-L6-v2 as its card uses it, the texts that its splits learn from, and their training to the dense model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moeify
from bench.split_data import FIT_NOVELS, fit_words, held_out_words, sentences

INPUTS = [
    "input_ids=int64[batch=2,seq=16]{below=30522}",
    "attention_mask=int64[batch=2,seq=16]{below=2}",
]
BATCH = 50
FEW, MANY = (1000, 500), (4000, 2000)  # words and pairs of words, sentences: what is fitted to
HELD_OUT = 300, 200  # sentences, words and pairs
# Chosen by the texts that are held out: docs/SPLITTING.md has what else was tried.
TRAIN: Mapping[str, Any] = {"steps": 500, "batch": 16, "lr": 3e-4, "only": "experts", "dropout": False}
TRAIN_WORDS, LONGEST = 4000, 24  # words and pairs; tokens of a sentence, so that less is padding
LOSS = "bench.split_minilm:away"
Batches = list[dict[str, Tensor]]


class Encoder:
    """The tokenizer and the dense model."""

    def __init__(self) -> None:
        import pretrained
        from transformers import AutoModel, AutoTokenizer

        self.folder: Path = pretrained.minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModel.from_pretrained(self.folder).eval()

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """All as long as the longest."""
        taken = self.tokenizer(texts, padding=True, return_tensors="pt")
        return {name: taken[name] for name in ("input_ids", "attention_mask")}

    def batches(self, texts: list[str]) -> Batches:
        """In order, each as long as its longest text."""
        return [self.tokens(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]

    def embed(self, model: nn.Module, texts: list[str]) -> Tensor:
        """Normalised embeddings [texts, width]."""
        with torch.no_grad():
            found = [pooled(model(**batch), batch["attention_mask"]) for batch in self.batches(texts)]
        return F.normalize(torch.cat(found), dim=1)

    def cosine(self, model: nn.Module, texts: list[str]) -> float:
        """Of the embeddings with the dense model's, the mean."""
        return float((self.embed(model, texts) * self.embed(self.model, texts)).sum(1).mean())


def pooled(output: Mapping[str, Tensor], mask_BS: Tensor) -> Tensor:
    """Mean of the last hidden states over the real tokens [batch, width]: what the model's card prescribes."""
    on_BS1 = mask_BS.unsqueeze(-1)
    return (output["last_hidden_state"] * on_BS1).sum(1) / on_BS1.sum(1)


def away(output: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """What training lowers: 1 - cosine with the dense model's embeddings, which lie in the data beside the inputs."""
    return 1 - F.cosine_similarity(pooled(output, batch["attention_mask"]), batch["embedding"], dim=1).mean()


def to_fit(encoder: Encoder, words: int, count: int) -> Batches:
    """Batches of words and batches of sentences, mixed: the last rows are held out from the fit."""
    draw = random.Random(0)
    texts = draw.sample(sentences(*FIT_NOVELS), count)
    batches = encoder.batches(fit_words(words)) + encoder.batches(texts)
    draw.shuffle(batches)
    return batches


def held_out() -> tuple[list[str], list[str]]:
    """Sentences, and words and pairs, that are neither fitted to nor trained on, nor in a test."""
    told = sentences(*FIT_NOVELS)
    fitted = {one for _, count in (FEW, MANY) for one in random.Random(0).sample(told, count)}
    count, words = HELD_OUT
    return random.Random(2).sample([one for one in told if one not in fitted], count), held_out_words(words)


def trained(encoder: Encoder, split: Path) -> nn.Module:
    """A split, its experts trained to give the dense model's embeddings: no labels, no text of a test."""
    out = set(held_out()[0])
    told = [one for one in sentences(*FIT_NOVELS) if one not in out]
    texts = [one for one in fit_words(TRAIN_WORDS) + told if len(encoder.tokenizer(one)["input_ids"]) <= LONGEST]
    data = {**encoder.tokens(texts), "embedding": encoder.embed(encoder.model, texts)}
    return moeify.train(split, data, loss=LOSS, test_part=0.0, **TRAIN).module.eval()
