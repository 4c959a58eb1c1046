"""Does a dense model that is turned into experts learn more from the same arithmetic than the dense model?

A small GPT is trained on Austen, character by character. Then it goes on as it is; as experts that are copies (sparse
upcycling, Komatsuzaki et al., arXiv 2212.05055); as copies half of whose hidden units are drawn anew (Drop-Upcycling,
Nakamura et al., arXiv 2502.19261); as shards of copies, which cost no more per token than the dense blocks (He et al.,
arXiv 2410.07524); and against experts that start from nothing. All are given the same further training FLOPs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from corpus import Corpus, characters, read
from experiment import Table, finish, options, over_seeds, prepare, seeds, write_plot
from language_model import GPT, Point, Schedule, step_flops, train

import moeify
from moeify import Recipe

DENSE = "dense, continued"
LOSSES = ("switch",)
TOP_K = 2


@dataclass(frozen=True)
class Arm:
    """How experts are made, whether of the trained model, and in how many shards."""

    method: str
    trained: bool = True
    shards: int = 1


ARMS = {
    "copy": Arm("copy"),
    "drop, half anew": Arm("drop{ratio=0.5}"),
    # Two of the shards are as wide as the dense block, so they cost no more.
    "granular, two shards": Arm("granular{shards=2}", shards=2),
    # With every hidden unit drawn anew nothing is left of the dense blocks.
    "from scratch": Arm("drop{ratio=1}", trained=False),
}


def arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.add_argument("--steps", type=int, default=1000, help="of the dense model, and FLOPs of as many more for all")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--batch", type=int, default=64, help="sequences in a step")
    parser.add_argument("--sequence", type=int, default=256, help="characters in a sequence")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate, the same in all runs")
    parser.add_argument("--experts", type=int, default=8, help=f"of each block, of which a character gets {TOP_K}")
    parser.add_argument("--blocks", default="all", help="which become experts, as for moeify convert")
    args = parser.parse_args()
    if args.small:
        args.steps, args.width, args.layers, args.batch, args.sequence, args.seeds = 20, 32, 1, 8, 32, 1
    return args


def sparse(model: GPT, arm: Arm, corpus: Corpus, args: argparse.Namespace, seed: int) -> Any:
    """The model converted by moeify, on the device of the corpus."""
    experts = args.experts * arm.shards
    recipe = Recipe(
        method=arm.method, experts=experts, top_k=TOP_K, blocks=args.blocks, router_losses=LOSSES, seed=seed
    )
    example = next(corpus.held_out_batches(2, args.sequence))[:, :-1].cpu()
    return moeify.convert(copy.deepcopy(model).cpu().eval(), recipe, inputs={"tokens": example}).to(corpus.train.device)


def runs_of(seed: int, corpus: Corpus, args: argparse.Namespace) -> dict[str, list[Point]]:
    """By name of the run: its held-out losses over FLOPs and time, the pretraining's first."""
    torch.manual_seed(seed)
    fresh = GPT(corpus.vocabulary, args.width, args.layers, args.sequence)
    dense = copy.deepcopy(fresh).to(args.device)
    schedule = Schedule(args.steps, args.batch, args.sequence, args.rate)
    budget = args.steps * step_flops(dense, schedule)
    found = {"pretraining": train(dense, corpus, schedule, seed=seed, flops=budget / args.steps)}

    def more(model: Any, flops: float, losses: Sequence[str] = ()) -> list[Point]:
        further = Schedule(round(budget / flops), args.batch, args.sequence, args.rate, decay=0.3)
        return train(model, corpus, further, seed=1000 + seed, losses=losses, flops=flops, points=10)

    def tell(name: str) -> None:
        print(f"seed {seed}: {name}: {found[name][0].loss:.4f} to {found[name][-1].loss:.4f}", flush=True)

    tell("pretraining")
    found[DENSE] = more(copy.deepcopy(dense), budget / args.steps)
    tell(DENSE)
    for name, arm in ARMS.items():
        model = sparse(dense if arm.trained else fresh, arm, corpus, args, seed)
        found[name] = more(model, step_flops(dense, schedule, model.moeify_report), LOSSES)
        tell(name)
    return found


def table(runs: list[dict[str, list[Point]]], name: str) -> Table:
    rows = []
    for arm in (DENSE, *ARMS):
        ends = [run[arm][-1] for run in runs]
        gains = [run[DENSE][-1].loss - run[arm][-1].loss for run in runs]
        rows.append(
            [
                arm,
                str(ends[0].step),
                f"{ends[0].flops:.2e}",
                over_seeds([end.seconds for end in ends], 1),
                over_seeds([run[arm][0].loss for run in runs]),
                over_seeds([end.loss for end in ends]),
                "" if arm == DENSE else over_seeds(gains),
            ]
        )
    columns = ["experts", "steps", "FLOPs", "seconds", "loss before", "loss after", "below the dense model"]
    return Table(f"Held-out loss, nats a character, after the same further FLOPs: {name}", columns, rows)


def verdicts(runs: list[dict[str, list[Point]]]) -> list[str]:
    """How far each arm ends from the dense model, and in how many seeds below it."""
    found = []
    for arm in ARMS:
        gains = [run[DENSE][-1].loss - run[arm][-1].loss for run in runs]
        wins = sum(gain > 0 for gain in gains)
        side = "below" if mean(gains) > 0 else "above"
        found.append(f"{arm}: {abs(mean(gains)):.4f} {side} the dense model, below it in {wins} of {len(gains)} seeds")
    return found


def draw(runs: list[dict[str, list[Point]]], path: Path) -> None:
    """Held-out loss over further FLOPs and over time, the mean of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_flops, by_time = figure.subplots(1, 2, sharey=True)
    for arm in (DENSE, *ARMS):
        points = list(zip(*(run[arm] for run in runs)))
        losses = [mean(point.loss for point in same) for same in points]
        by_flops.plot([same[0].flops for same in points], losses, "o-", markersize=3, label=arm)
        by_time.plot([mean(point.seconds for point in same) for same in points], losses, "o-", markersize=3)
    dense = [mean(run[DENSE][i].loss for run in runs) for i in (0, -1)]
    by_flops.set_ylim(dense[1] - 0.4 * (dense[0] - dense[1]), dense[0] + 0.6 * (dense[0] - dense[1]))
    by_flops.set(xlabel="further training FLOPs", ylabel="held-out loss, nats a character")
    by_time.set(xlabel="seconds of training")
    by_flops.legend()
    write_plot(path, figure)


def main() -> None:
    args = arguments()
    prepare(args)
    corpus = characters(read(args.data, args.small), args.device)
    print(corpus.name)
    runs = [runs_of(seed, corpus, args) for seed in seeds(args)]
    finish(args, table(runs, corpus.name), runs, draw)
    print(*verdicts(runs), sep="\n")


if __name__ == "__main__":
    main()
