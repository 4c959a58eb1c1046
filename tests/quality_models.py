"""Small models, dense and converted, and the report on them."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

import moeify
from moeify.api import QualityReport

VOCABULARY, WIDTH, BATCH = 20, 8, 4
INPUTS = ["input_ids=int64[batch=2,seq=6]{below=20}", "attention_mask=int64[batch=2,seq=6]{below=2}"]
SPLIT = {"method": "split-random", "experts": 3, "shared": 1, "top_k": 1}
MODULE = __name__  # what a file of these models asks to import
FLAGS = [word for spec in INPUTS for word in ("--input", spec)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    """A language model whose positions do not see each other, so it is causal; and a head for three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head, self.pooled = nn.Linear(WIDTH, VOCABULARY), nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.layers(self.embed(input_ids))
        mask = attention_mask[..., None].to(x.dtype)
        return {"logits": self.head(x), "states": x, "pooled": self.pooled((x * mask).sum(1) / mask.sum(1))}


class Unmasked(Model):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return super().forward(input_ids, torch.ones_like(input_ids))


class Classifier(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.layer, self.head = name, Layer(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {self.name: self.head(self.layer(x).mean(1)), "most": x.amax((1, 2))}


def drawn(rows: int = 10) -> dict[str, Tensor]:
    """Texts of 3 to 6 tokens in a batch of width 6, padding on the right."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (rows, 6), generator=draw)
    lengths = torch.randint(3, 7, (rows, 1), generator=draw)
    return {"input_ids": ids, "attention_mask": (torch.arange(6) < lengths).long()}


@functools.cache
def models() -> tuple[nn.Module, nn.Module]:
    """For a fixture: (dense, converted)."""
    torch.manual_seed(0)
    dense = Model().eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(2)  # so that an expert left out shows
    return dense, moeify.convert(copy.deepcopy(dense), inputs=INPUTS, **SPLIT)


@functools.cache
def report() -> QualityReport:
    """For a fixture: what the figures and the command are compared with."""
    return moeify.quality(*models(), drawn(), inputs=INPUTS, batch=BATCH, classes=True)
