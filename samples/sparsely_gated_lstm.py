"""What the importance and load losses do to a sparsely-gated layer of experts between two LSTMs.

Table 6 of Shazeer et al. 2017 (arXiv 1701.06538), small: a language model over words, a feed-forward layer between two
LSTMs, converted by moeify before it is trained, with their noisy top-k router and experts drawn on their own. It is
trained on Austen with six choices of the losses' weights, and dense.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from corpus import Corpus, read, words
from experiment import Table, finish, options, over_seeds, prepare, seeds, write_plot
from language_model import Schedule, train
from torch import Tensor, nn

import moeify
from moeify import Recipe

DENSE = "dense"
# (importance, load), the weights in the paper's table; it has 0.2 where one of them is alone.
WEIGHTS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1), (0.01, 0.01), (1.0, 1.0)]


class LanguageModel(nn.Module):
    """``tokens`` [B, S] to logits [B, S, vocabulary]. Residuals, and the sigmoid after the experts, as in the paper's
    appendix C.1.
    """

    def __init__(self, vocabulary: int, width: int, hidden: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.first = nn.LSTM(width, width, batch_first=True)
        self.experts = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.second = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embedding(tokens))
        x = x + self.dropout(self.first(x)[0])
        x = x + self.dropout(torch.sigmoid(self.experts(x)))
        x = x + self.dropout(self.second(x)[0])
        return self.head(x)


def arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.add_argument("--steps", type=int, default=500, help="of each run")
    parser.add_argument("--words", type=int, default=8192, help="in the vocabulary")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument(
        "--hidden", type=int, default=512, help="hidden units of an expert and of the dense layer, more than the width"
    )
    parser.add_argument("--experts", type=int, default=16, help="in the layer")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a word")
    parser.add_argument("--batch", type=int, default=128, help="sequences in a step")
    parser.add_argument("--sequence", type=int, default=64, help="words in a sequence")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate, the same in all runs")
    args = parser.parse_args()
    if args.small:
        args.steps, args.words, args.width, args.hidden, args.batch, args.sequence = 10, 300, 16, 32, 16, 16
        args.experts, args.seeds = 8, 1
    return args


def balance(model: Any, corpus: Corpus, schedule: Schedule) -> dict[str, float]:
    """``importance`` and ``load``: CV of the sums of weights and of the expected loads, the mean over the held-out
    batches; ``peak``: the largest load over the mean one, of all of them. With the noise of training, as the losses
    see it.
    """
    moeify.observe(model)
    model.train()
    seen: dict[str, list[float]] = {"importance": [], "load": []}
    with moeify.routing(model) as recorder:
        for ids in corpus.held_out_batches(schedule.batch, schedule.sequence):
            model(ids[:, :-1])
            for name, value in moeify.losses(model, ["importance{weight=1}", "load{weight=1}"]).items():
                seen[name].append(value.item() ** 0.5)
    return {name: mean(values) for name, values in seen.items()} | {"peak": recorder.report().blocks[0].peak}


def runs_of(seed: int, corpus: Corpus, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The dense model, then one run for each pair of weights."""
    torch.manual_seed(seed)
    dense = LanguageModel(corpus.vocabulary, args.width, args.hidden)
    schedule = Schedule(args.steps, args.batch, args.sequence, args.rate, decay=0.3)
    example = next(corpus.held_out_batches(2, args.sequence))[:, :-1].cpu()
    recipe = Recipe(
        method="drop{ratio=1}",  # nothing of the dense layer is kept
        experts=args.experts,
        top_k=args.top_k,
        router="noisy-topk",
        seed=seed,
    )
    sparse = moeify.convert(copy.deepcopy(dense).eval(), recipe, inputs={"tokens": example})
    found: list[dict[str, Any]] = []
    for weights in [None, *WEIGHTS]:
        named = zip(("importance", "load"), weights or ())
        losses = [f"{name}{{weight={weight}}}" for name, weight in named if weight]
        model = copy.deepcopy(sparse if weights else dense).to(args.device)
        end = train(model, corpus, schedule, seed=seed, losses=losses)[-1]
        run: dict[str, Any] = {"weights": weights, "perplexity": math.exp(end.loss), "seconds": end.seconds}
        if weights:
            run |= balance(model, corpus, schedule)
        found.append(run)
        print(f"seed {seed}: {weights or DENSE}: perplexity {run['perplexity']:.2f}", flush=True)
    return found


COLUMNS = {
    "perplexity": ("test perplexity", 2),
    "importance": ("CV(importance)", 2),
    "load": ("CV(load)", 2),
    "peak": ("max/mean load", 2),
    "seconds": ("seconds", 1),
}


def table(runs: list[list[dict[str, Any]]], name: str) -> Table:
    rows = []
    for same in zip(*runs):
        weights = same[0]["weights"]
        cells = [f"{weight:g}" for weight in weights] if weights else [DENSE, ""]
        for figure, (_, digits) in COLUMNS.items():
            cells.append(over_seeds([run[figure] for run in same], digits) if figure in same[0] else "")
        rows.append(cells)
    columns = ["importance loss", "load loss", *(title for title, _ in COLUMNS.values())]
    return Table(f"The losses of the sparsely-gated layer: {name}", columns, rows)


def draw(runs: list[list[dict[str, Any]]], path: Path) -> None:
    """Perplexity, and the imbalance, for each pair of weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    labels = [f"{importance:g}, {load:g}" for importance, load in WEIGHTS]
    for axes, name in zip(figure.subplots(1, 3), ("perplexity", "importance", "peak")):
        for run in runs:
            axes.plot(labels, [one[name] for one in run if one["weights"]], "o", color="C0")
        axes.set(ylabel=COLUMNS[name][0], xlabel="weights of importance, load")
        axes.tick_params(axis="x", rotation=45)
    figure.axes[0].axhline(mean(run[0]["perplexity"] for run in runs), color="grey", linewidth=0.8, label="dense")
    figure.axes[0].legend()
    write_plot(path, figure)


def main() -> None:
    args = arguments()
    prepare(args)
    corpus = words(read(args.data, args.small), args.device, args.words)
    print(corpus.name)
    runs = [runs_of(seed, corpus, args) for seed in seeds(args)]
    finish(args, table(runs, corpus.name), runs, draw)


if __name__ == "__main__":
    main()
