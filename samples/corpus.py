"""A text as numbers. Its last twentieth is held out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from austen import novels
from torch import Tensor

_HELD_OUT = 0.05


@dataclass(frozen=True)
class Text:
    name: str
    content: str


def read(data: Path | None, small: bool) -> Text:
    """The file ``data``; without one Austen's six novels where their package is (see austen.py), else, and where a
    ``small`` text will do, the README of this repository.
    """
    if data is not None:
        return Text(data.name, data.read_text())
    austen = [] if small else novels()
    if austen:
        return Text("Austen's novels", "\n\n".join(austen))
    return Text("README.md", (Path(__file__).resolve().parent.parent / "README.md").read_text())


@dataclass(frozen=True)
class Corpus:
    """``train`` and ``held_out`` are token ids, one dimension; ``vocabulary`` is their number of kinds."""

    name: str
    vocabulary: int
    train: Tensor
    held_out: Tensor

    def batches(self, size: int, sequence: int, seed: int) -> Iterator[Tensor]:
        """Without end: [size, sequence + 1] ids from random places of the training text. One seed, one series."""
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(sequence + 1, device=self.train.device)
        while True:
            starts = torch.randint(len(self.train) - sequence, (size, 1), generator=generator)
            yield self.train[starts.to(self.train.device) + offsets]

    def held_out_batches(self, size: int, sequence: int) -> Iterator[Tensor]:
        """All of the held-out text, in pieces that overlap by one token; what does not fill a piece is left out."""
        pieces = self.held_out.unfold(0, sequence + 1, sequence)
        yield from pieces.split(size)


def characters(text: Text, device: str) -> Corpus:
    """Every character is a token."""
    return _corpus(text.name, list(text.content), sorted(set(text.content)), device)


def words(text: Text, device: str, most: int) -> Corpus:
    """Words in lower case and marks, the ``most`` frequent ones; one token stands for all others."""
    found = re.findall(r"[a-z']+|[^a-z'\s]", text.content.lower())
    return _corpus(text.name, found, ["<unknown>", *(word for word, _ in Counter(found).most_common(most - 1))], device)


def _corpus(name: str, tokens: Sequence[str], kinds: Sequence[str], device: str) -> Corpus:
    number = {kind: i for i, kind in enumerate(kinds)}
    ids = torch.tensor([number.get(token, 0) for token in tokens], device=device)
    kept = len(ids) - int(_HELD_OUT * len(ids))
    return Corpus(f"{name}, {len(ids):,} tokens of {len(kinds)} kinds", len(kinds), ids[:kept], ids[kept:])
