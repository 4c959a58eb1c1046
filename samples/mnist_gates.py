"""Does a mixture of experts that is trained on MNIST and Fashion-MNIST share the classes out among its experts?

The first mixture of experts (Jacobs et al. 1991) has a gate network beside its experts and mixes their probabilities.
Krishnamurthy et al. (arXiv 2302.14703) find that it leaves experts unused or alike even on these data, and propose the
attentive gate, which looks at what the experts' hidden layers say, and the similarity loss. Both gates are trained here
with and without that loss and the importance loss (Shazeer et al., arXiv 1701.06538).

The attentive gate needs every expert's hidden layer, so nothing is saved by it. "distilled" is a plain gate that learns
the weights of the attentive one afterwards, with its experts as they are: such a mixture can leave experts out.

What is asked of the test images: accuracy of the whole mixture, and of each image's first expert alone (top-1); the
entropy of an image's weights and of the mean weights; what the first expert tells of the class (mutual information);
and how many experts are the first one of 1 % of the images. Entropy and information are in bits: log2(10) = 3.32 is the
most of each.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experiment import Table, finish, options, over_seeds, seeds
from images import CLASSES, DIGITS, FASHION, HELP, PIXELS, Images, images, train
from torch import Tensor, nn

from moeify.nn.attentive import AttentiveGate
from moeify.nn.competitive import competitive
from moeify.nn.losses.importance import importance
from moeify.nn.losses.similarity import similarity

SOFT, ATTENTIVE, DISTILLED = "soft", "attentive", "attentive, distilled"
IMPORTANCE, SIMILARITY = "importance", "similarity"
LOSSES = ((), (IMPORTANCE,), (SIMILARITY,), (IMPORTANCE, SIMILARITY))
PAIRED = 64  # images of a batch whose pairs the similarity loss looks at
FIGURES = {"accuracy": 4, "top1_accuracy": 4, "entropy": 2, "mean_entropy": 2, "information": 2, "experts_used": 1}
COLUMNS = (
    "images",
    "gate",
    "losses",
    "accuracy",
    "top-1",
    "H of an image",
    "H of the mean",
    "I(expert; class)",
    "used",
)


class Experts(nn.Module):
    """``softmax(down_i relu(up_i x))`` of all experts at once; gives hidden values [T, E, F] and log-probabilities
    [T, E, C].
    """

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(PIXELS, experts * width)
        self.down = nn.Parameter(torch.empty(experts, CLASSES, width).uniform_(-1, 1) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(experts, CLASSES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.up(x)).unflatten(1, (self.down.shape[0], -1))
        return hidden, (torch.einsum("tef,ecf->tec", hidden, self.down) + self.bias).log_softmax(2)


class Mixture(nn.Module):
    """Gives the gate's logits [T, E] and the experts' log-probabilities [T, E, C]."""

    def __init__(self, gate: str, experts: Experts, args: argparse.Namespace) -> None:
        super().__init__()
        self.experts = experts
        self.hidden = nn.Linear(PIXELS, args.gate_width)
        if gate == ATTENTIVE:
            self.gate: nn.Module = AttentiveGate(args.gate_width, args.width, args.gate_width)
        else:
            self.gate = nn.Linear(args.gate_width, args.experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, log_probabilities = self.experts(x)
        seen = torch.relu(self.hidden(x))
        logits = self.gate(seen, hidden) if isinstance(self.gate, AttentiveGate) else self.gate(seen)
        return logits, log_probabilities


def arguments() -> argparse.Namespace:
    parser = options(__doc__ or "", data=HELP)
    parser.add_argument("--experts", type=int, default=10, help="of a mixture")
    parser.add_argument("--width", type=int, default=16, help="hidden units of an expert")
    parser.add_argument("--gate-width", type=int, default=32, help="hidden units of the gate network")
    parser.add_argument("--steps", type=int, default=1200, help="of training, and of distilling")
    parser.add_argument("--batch", type=int, default=256, help="images of a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--importance", type=float, default=0.1, help="weight of the importance loss")
    parser.add_argument("--same", type=float, default=10.0, help="beta_s of the similarity loss")
    parser.add_argument("--different", type=float, default=10.0, help="beta_d of the similarity loss")
    args = parser.parse_args()
    if args.small:
        args.seeds, args.steps, args.experts, args.batch = 1, 20, 4, 64
    return args


def trained(gate: str, losses: tuple[str, ...], data: Images, seed: int, args: argparse.Namespace) -> Mixture:
    torch.manual_seed(seed)
    model = Mixture(gate, Experts(args.experts, args.width), args).to(data.train_x.device)
    everyone = torch.arange(args.experts, device=data.train_x.device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits, log_probabilities = model(x)
        wanted = y[:, None, None].expand(-1, args.experts, 1)
        value = competitive(logits, -log_probabilities.gather(2, wanted).squeeze(2))
        weights = logits.softmax(1)
        if IMPORTANCE in losses:
            value = value + args.importance * importance(everyone.expand_as(weights), weights, args.experts)
        if SIMILARITY in losses:
            value = value + similarity(weights[:PAIRED], x[:PAIRED], args.same, args.different)
        return value

    train(list(model.parameters()), loss, data, seed, args.steps, args.batch, args.lr)
    return model


def distilled(teacher: Mixture, data: Images, seed: int, args: argparse.Namespace) -> Mixture:
    """The teacher's experts behind a plain gate, which learns the teacher's weights by their KL divergence."""
    torch.manual_seed(seed)
    model = Mixture(SOFT, teacher.experts, args).to(data.train_x.device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted, _ = teacher(x)
        logits = model.gate(torch.relu(model.hidden(x)))
        return F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)

    learned = [*model.hidden.parameters(), *model.gate.parameters()]
    train(learned, loss, data, seed, args.steps, args.batch, args.lr)
    return model


@torch.no_grad()
def figures(model: Mixture, data: Images) -> dict[str, Any]:
    """Those of ``FIGURES`` on the test images; ``table`` counts them by first expert and class."""
    logits, log_probabilities = model(data.test_x)
    weights, first = logits.softmax(1), logits.argmax(1)
    mixed = (logits.log_softmax(1).unsqueeze(2) + log_probabilities).logsumexp(1)
    alone = log_probabilities[torch.arange(len(first), device=first.device), first]
    experts = logits.shape[1]
    table = torch.bincount(first * CLASSES + data.test_y, minlength=experts * CLASSES).view(experts, CLASSES)
    joint = table.double() / len(first)
    return {
        "accuracy": float((mixed.argmax(1) == data.test_y).double().mean()),
        "top1_accuracy": float((alone.argmax(1) == data.test_y).double().mean()),
        "entropy": float(bits(weights.double()).mean()),
        "mean_entropy": float(bits(weights.double().mean(0))),
        "information": float(bits(joint.sum(0)) + bits(joint.sum(1)) - bits(joint.flatten())),
        "experts_used": int((joint.sum(1) >= 0.01).sum()),
        "table": table.tolist(),
    }


def bits(p: Tensor) -> Tensor:
    """Entropy over the last axis."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def runs_of(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    data = images(name, args.data, args.device)
    if args.small:
        data = data.first(2000, 500)
    runs = []
    for seed in seeds(args):
        for gate in (SOFT, ATTENTIVE):
            for losses in LOSSES:
                model = trained(gate, losses, data, seed, args)
                runs.append({"images": name, "gate": gate, "losses": losses, "seed": seed, **figures(model, data)})
                if gate == ATTENTIVE:
                    found = figures(distilled(model, data, seed, args), data)
                    runs.append({"images": name, "gate": DISTILLED, "losses": losses, "seed": seed, **found})
    return runs


def table(runs: list[dict[str, Any]]) -> Table:
    rows = []
    for name in (DIGITS, FASHION):
        for gate in (SOFT, ATTENTIVE, DISTILLED):
            for losses in LOSSES:
                same = [run for run in runs if (run["images"], run["gate"], run["losses"]) == (name, gate, losses)]
                cells = [over_seeds([run[figure] for run in same], digits) for figure, digits in FIGURES.items()]
                rows.append([name, gate, " + ".join(losses) or "none", *cells])
    return Table("Gates on MNIST and Fashion-MNIST, entropy and information in bits", COLUMNS, rows)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Which classes have which first expert, of the first seed: one column a class, one row an expert."""
    from matplotlib.figure import Figure

    chosen = [run for run in runs if run["seed"] == 0 and run["gate"] != DISTILLED]
    figure = Figure(figsize=(11, 11), layout="constrained")
    for place, run in zip(figure.subplots(4, 4).flat, chosen):
        place.imshow(torch.tensor(run["table"]), cmap="Blues", aspect="auto")
        place.set_title(f"{run['images']}, {run['gate']}\n{' + '.join(run['losses']) or 'no loss'}", fontsize=9)
        place.set(xlabel="class", ylabel="expert")
    figure.savefig(path, dpi=110)


def main() -> None:
    args = arguments()
    began = time.perf_counter()
    runs = [run for name in (DIGITS, FASHION) for run in runs_of(name, args)]
    finish(args, table(runs), runs, draw)
    print(f"{len(runs)} mixtures in {time.perf_counter() - began:.0f} s on {args.device}")


if __name__ == "__main__":
    main()
