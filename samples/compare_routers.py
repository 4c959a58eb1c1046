"""The routers of moeify on one model: what each is worth, and how evenly it loads its experts.

A small GPT is trained on Austen, character by character. Every second of its blocks becomes copies (sparse upcycling)
in front of which stands each router in turn, with the router loss that its paper has; all are trained for the same
number of steps on the same text. Left out are routers whose choice looks at later tokens also when the model is used,
and those that need experts which are parts of a block.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from corpus import Corpus, characters, read
from experiment import Table, finish, options, over_seeds, prepare, seeds, write_plot
from language_model import GPT, Schedule, train

import moeify
from moeify import Recipe
from moeify.nn.routers import ROUTERS
from moeify.training.router_facts import facts, top_k_of

DENSE = "none, dense"
ACTIVE = 2  # experts of a token, of routers that let one choose
# What the papers train these with. Others have the loss of Switch Transformers, if its gradient reaches them, unless
# they balance themselves.
LOSSES = {
    "gshard": ("gshard",),
    "noisy-topk": ("importance", "load"),
    "relu": (f"l1{{active={ACTIVE}}}",),
    "rl": ("reinforce", "switch"),
}


def arguments() -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.add_argument("--dense-steps", type=int, default=1000, help="of the dense model, before it is converted")
    parser.add_argument("--steps", type=int, default=250, help="with each router")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step")
    parser.add_argument("--sequence", type=int, default=256, help="characters in a sequence")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate, the same in all runs")
    parser.add_argument("--experts", type=int, default=8, help="of each block")
    parser.add_argument("--blocks", default="every:2", help="which become experts, as for moeify convert")
    parser.add_argument("--routers", default=",".join(ROUTERS), help="which; those that do not fit are left out")
    args = parser.parse_args()
    if args.small:
        args.routers = "softmax-topk,relu,hash,rl,base"
        args.dense_steps, args.steps, args.seeds, args.blocks = 20, 3, 1, "all"
        args.width, args.layers, args.batch, args.sequence, args.experts = 32, 1, 8, 32, 4
    return args


def recipe_of(router: str, experts: int, blocks: str, seed: int) -> Recipe | None:
    """None for a router that is left out."""
    found, spec = facts(router), ROUTERS.parse(router)
    if found.mixes_tokens == "always" or found.needs == "a split":
        return None
    top_k = min(top_k_of(spec), experts)
    if found.experts.startswith("at most"):  # their papers know no limit
        top_k = experts
    losses = LOSSES.get(router)
    if losses is None:
        balanced = "after_step" in found.learns or bool(found.mixes_tokens)
        losses = ("switch",) if "switch" in found.losses and not balanced else ()
    if found.mixes_tokens:  # in training alone
        spec = dataclasses.replace(spec, allow_causal=True)
    return Recipe(
        experts=experts, top_k=top_k, router=str(spec), router_losses=losses, blocks=blocks, seed=seed
    )  # fmt: skip


def figures(model: Any, corpus: Corpus, schedule: Schedule, seed: int, losses: Sequence[str] = ()) -> dict[str, float]:
    """The model trained, its losses, and what its routers do with the held-out text, the mean of the blocks."""
    before, after = train(model, corpus, schedule, seed=seed, losses=losses)
    found = {"before": before.loss, "after": after.loss, "milliseconds": 1e3 * after.seconds / schedule.steps}
    if hasattr(model, "moeify_report"):
        with torch.no_grad(), moeify.routing(model.eval()) as seen:
            for ids in corpus.held_out_batches(schedule.batch, schedule.sequence):
                model(ids[:, :-1])
        blocks = seen.report().blocks
        for name in ("experts_per_token", "cv", "peak", "entropy", "dropped"):
            found[name] = mean(getattr(block, name) for block in blocks)
    return found


def runs_of(seed: int, corpus: Corpus, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By router."""
    torch.manual_seed(seed)
    dense = GPT(corpus.vocabulary, args.width, args.layers, args.sequence).to(args.device)
    train(dense, corpus, Schedule(args.dense_steps, args.batch, args.sequence, args.rate), seed=seed)
    schedule = Schedule(args.steps, args.batch, args.sequence, args.rate, decay=0.3)
    example = next(corpus.held_out_batches(2, args.sequence))[:, :-1].cpu()
    found = {DENSE: figures(copy.deepcopy(dense), corpus, schedule, 1000 + seed)}
    for router in args.routers.split(","):
        recipe = recipe_of(router, args.experts, args.blocks, seed)
        if recipe is not None:
            model = moeify.convert(copy.deepcopy(dense).cpu().eval(), recipe, inputs={"tokens": example})
            found[router] = figures(model.to(args.device), corpus, schedule, 1000 + seed, recipe.router_losses)
            print(f"seed {seed}: {router}: {found[router]['before']:.4f} to {found[router]['after']:.4f}", flush=True)
    return found


COLUMNS = {
    "before": ("loss before", 3),
    "after": ("loss after", 4),
    "experts_per_token": ("experts a token", 2),
    "cv": ("cv", 2),
    "peak": ("max/mean", 2),
    "entropy": ("entropy", 3),
    "dropped": ("dropped", 3),
    "milliseconds": ("ms a step", 1),
}


def table(runs: list[dict[str, dict[str, float]]], name: str, args: argparse.Namespace) -> Table:
    """The best first."""
    order = sorted(runs[0], key=lambda router: mean(run[router]["after"] for run in runs))
    rows = []
    for router in order:
        recipe = None if router == DENSE else recipe_of(router, args.experts, args.blocks, 0)
        cells = [router, ", ".join(recipe.router_losses) if recipe else ""]
        for figure, (_, digits) in COLUMNS.items():
            cells.append(over_seeds([run[router][figure] for run in runs], digits) if figure in runs[0][router] else "")
        rows.append(cells)
    columns = ["router", "its loss", *(title for title, _ in COLUMNS.values())]
    return Table(f"Held-out loss, nats a character, and loads of the experts: {name}", columns, rows)


def draw(runs: list[dict[str, dict[str, float]]], path: Path) -> None:
    """Loss over imbalance, a point for each router and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    routers = [router for router in runs[0] if router != DENSE]
    for i, router in enumerate(routers):
        points = [run[router]["cv"] for run in runs], [run[router]["after"] for run in runs]
        axes.plot(*points, "os^"[i // 10], label=router)  # matplotlib has ten colours
    axes.axhline(mean(run[DENSE]["after"] for run in runs), color="grey", linewidth=0.8, label="dense")
    axes.set(xlabel="cv of the experts' loads, held-out text", ylabel="held-out loss, nats a character")
    figure.legend(loc="outside right upper")
    write_plot(path, figure)


def main() -> None:
    args = arguments()
    prepare(args)
    corpus = characters(read(args.data, args.small), args.device)
    print(corpus.name)
    runs = [runs_of(seed, corpus, args) for seed in seeds(args)]
    finish(args, table(runs, corpus.name, args), runs, draw)


if __name__ == "__main__":
    main()
