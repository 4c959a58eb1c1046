"""Do the probabilities of a classifier mean what they say, before and after it is turned into experts?

A dense classifier is trained on Fashion-MNIST. Then it goes on as it is, and as 8 experts a block that moeify makes of
it, one (switch) or two (softmax-topk) for each image: all for the same further steps on the same batches. Of each the
expected calibration error over 15 bins is measured on the test images, and again after the scores were divided by a
temperature that suits images nobody was trained on (Guo et al., On Calibration of Modern Neural Networks, arXiv
1706.04599).
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from experiment import Table, finish, options, over_seeds, seeds
from images import CLASSES, FASHION, HELP, PIXELS, Images, images, train
from torch import Tensor, nn

import moeify

BEFORE, DENSE = "dense", "dense, continued"
# Without a capacity: which experts an image gets depends on no other image, as it must when it is measured.
MIXTURES = {
    "experts, top-1": ("switch{capacity-factor=0}", 1),
    "experts, top-2": ("softmax-topk", 2),
}  # router and top-k
BINS = 15
FIGURES = {"accuracy": 4, "confidence": 4, "nll": 4, "ece": 4, "temperature": 2, "ece_at_temperature": 4}
COLUMNS = ("model", "accuracy", "mean confidence", "NLL", "ECE", "temperature", "ECE at it")


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Scores [N, 10] of images [N, 784]."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(images))))


def arguments() -> argparse.Namespace:
    parser = options(__doc__ or "", data=HELP)
    parser.add_argument("--experts", type=int, default=8, help="of a block")
    parser.add_argument("--width", type=int, default=128, help="of the classifier")
    parser.add_argument("--blocks", type=int, default=2, help="of the classifier")
    parser.add_argument("--steps", type=int, default=1500, help="of the dense classifier, and of what comes after")
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--held-out", type=int, default=5000, help="training images that only the temperature sees")
    args = parser.parse_args()
    if args.small:
        args.seeds, args.steps, args.held_out, args.width, args.experts = 1, 20, 500, 32, 4
    return args


def fit(model: nn.Module, data: Images, seed: int, args: argparse.Namespace) -> nn.Module:
    """Cross entropy, and the router losses of the recipe where there is one."""
    routed = hasattr(model, "moeify_report")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(model(x), y)
        return value + moeify.losses(model).total if routed else value

    train(list(model.train().parameters()), loss, data, seed, args.steps, args.batch, args.lr)
    return model.eval()


def converted(dense: nn.Module, router: str, top_k: int, data: Images, seed: int, experts: int) -> nn.Module:
    model = copy.deepcopy(dense).cpu()
    inputs = {"images": data.train_x[:64].cpu()}
    # An image is a token here, which moeify takes when it is asked to: ``sample``.
    recipe = moeify.Recipe(
        experts=experts, top_k=top_k, router=router, router_losses=("switch",), include=("sample",), seed=seed
    )
    return moeify.convert(model, recipe, inputs=inputs).to(data.train_x.device)


@torch.no_grad()
def figures(model: nn.Module, data: Images, held_out: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Those of ``FIGURES`` on the test images; ``bins`` has the share of images, mean confidence and accuracy of
    each bin."""
    scores, kept = model(data.test_x), model(held_out[0])
    temperature = best_temperature(kept, held_out[1])
    confidence, chosen = scores.softmax(1).max(1)
    bins = binned(confidence, chosen == data.test_y)
    tempered = binned((scores / temperature).softmax(1).amax(1), chosen == data.test_y)
    return {
        "accuracy": float((chosen == data.test_y).double().mean()),
        "confidence": float(confidence.double().mean()),
        "nll": float(F.cross_entropy(scores, data.test_y)),
        "ece": calibration_error(bins),
        "temperature": temperature,
        "ece_at_temperature": calibration_error(tempered),
        "bins": bins.tolist(),
    }


def binned(confidence: Tensor, right: Tensor) -> Tensor:
    """[BINS, 3] share of images, mean confidence, accuracy of equally wide bins, closed above; zeros where empty."""
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    sums = torch.zeros(BINS, 3, dtype=torch.float64, device=confidence.device)
    sums.index_add_(0, place, torch.stack([torch.ones_like(confidence), confidence, right.to(confidence)], 1).double())
    return torch.cat([sums[:, :1] / len(confidence), sums[:, 1:] / sums[:, :1].clamp_min(1)], 1)


def calibration_error(bins: Tensor) -> float:
    """``sum_b share_b |accuracy_b - confidence_b|``."""
    share, confidence, accuracy = bins.unbind(1)
    return float((share * (accuracy - confidence).abs()).sum())


def best_temperature(scores: Tensor, labels: Tensor) -> float:
    """The one of 0.50, 0.51, ... 5.00 with the least cross entropy."""
    tried = [step / 100 for step in range(50, 501)]
    return min(tried, key=lambda temperature: float(F.cross_entropy(scores / temperature, labels)))


def run_of(seed: int, data: Images, held_out: tuple[Tensor, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    dense = fit(Classifier(args.width, args.blocks).to(args.device), data, seed, args)
    found = {BEFORE: figures(dense, data, held_out)}
    models = {DENSE: copy.deepcopy(dense)}
    for name, (router, top_k) in MIXTURES.items():
        models[name] = converted(dense, router, top_k, data, seed, args.experts)
    for name, model in models.items():
        found[name] = figures(fit(model, data, args.seeds + seed, args), data, held_out)
    return found


def table(runs: list[dict[str, Any]], name: str) -> Table:
    rows = []
    for model in runs[0]:
        cells = [over_seeds([run[model][figure] for run in runs], digits) for figure, digits in FIGURES.items()]
        rows.append([model, *cells])
    return Table(f"Calibration on the test images of {name}, {BINS} bins", COLUMNS, rows)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Reliability diagrams of the first seed: accuracy over confidence, the size of a dot for the share of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(runs[0]), 4), layout="constrained")
    for place, model in zip(figure.subplots(1, len(runs[0]), sharey=True), runs[0]):
        filled = [one for one in runs[0][model]["bins"] if one[0]]
        place.plot([0, 1], [0, 1], "--", color="gray", linewidth=1)
        place.plot([one[1] for one in filled], [one[2] for one in filled], linewidth=1)
        place.scatter([one[1] for one in filled], [one[2] for one in filled], [400 * one[0] + 5 for one in filled])
        place.set(title=f"{model}\nECE {mean(run[model]['ece'] for run in runs):.4f}", xlabel="confidence")
        place.set(xlim=(0, 1), ylim=(0, 1))
    figure.axes[0].set_ylabel("accuracy")
    figure.savefig(path, dpi=110)


def main() -> None:
    args = arguments()
    began = time.perf_counter()
    data = images(FASHION, args.data, args.device)
    if args.small:
        data = data.first(2000, 500)
    data, held_out = data.holding_out(args.held_out)
    runs = [run_of(seed, data, held_out, args) for seed in seeds(args)]
    finish(args, table(runs, data.name), runs, draw)
    print(f"{len(runs[0])} models, {len(runs)} seeds in {time.perf_counter() - began:.0f} s on {args.device}")


if __name__ == "__main__":
    main()
