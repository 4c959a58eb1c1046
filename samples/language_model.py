"""A small GPT in plain PyTorch, and a training loop for it and for what moeify makes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from corpus import Corpus
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moeify

_DROPOUT = 0.1


class GPT(nn.Module):
    """Pre-norm decoder of Radford et al. 2019; ``tokens`` [B, S] to logits [B, S, vocabulary]."""

    def __init__(self, vocabulary: int, width: int, layers: int, sequence: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(sequence, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("join.weight", "ffn.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """Attention with heads of 32, and the feed-forward block that becomes experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.join(self._attend(self.attention_norm(x))))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

    def _attend(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Schedule:
    """AdamW; the learning rate goes up for ``warmup`` steps, stays, and goes down to zero over the last ``decay`` of
    them (a share). Haegele et al., arXiv 2405.18392.
    """

    steps: int
    batch: int
    sequence: int
    rate: float
    warmup: int = 20
    decay: float = 0.0

    def factor(self, step: int) -> float:
        left = (self.steps - step) / max(self.decay * self.steps, 1)
        return min((step + 1) / self.warmup, left if self.decay else 1.0, 1.0)


@dataclass(frozen=True)
class Point:
    """Of a training run: after ``step`` steps, ``flops`` and ``seconds`` of training, the loss on the held-out text, in
    nats a token.
    """

    step: int
    flops: float
    seconds: float
    loss: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def train(
    model: nn.Module,
    corpus: Corpus,
    schedule: Schedule,
    *,
    seed: int,
    losses: Sequence[str] = (),
    flops: float = 0.0,
    points: int = 1,
) -> list[Point]:
    """Train it on the next tokens; its losses at the start and ``points`` times, evenly.

    The router ``losses`` are added, and routers updated. ``flops`` are those of a step. The seed gives the batches, so
    that runs of one seed read the same text.
    """
    torch.manual_seed(seed)
    if losses:
        moeify.observe(model)
    routed = hasattr(model, "moeify_report")
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.1)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    stops = {round(schedule.steps * (i + 1) / points) for i in range(points)}
    found = [Point(0, 0.0, 0.0, held_out_loss(model, corpus, schedule))]
    seconds, started = 0.0, _now(corpus)
    for step, ids in zip(range(1, schedule.steps + 1), corpus.batches(schedule.batch, schedule.sequence, seed)):
        each = F.cross_entropy(model.train()(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = each.mean()
        if losses:
            loss = loss + moeify.losses(model, losses, reward=-each.detach()).total
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        if routed:
            moeify.after_step(model)
        if step in stops:
            seconds += _now(corpus) - started
            found.append(Point(step, step * flops, seconds, held_out_loss(model, corpus, schedule)))
            started = _now(corpus)
    return found


@torch.no_grad()
def held_out_loss(model: nn.Module, corpus: Corpus, schedule: Schedule) -> float:
    """In nats a token."""
    model.eval()
    total, tokens = 0.0, 0
    for ids in corpus.held_out_batches(schedule.batch, schedule.sequence):
        logits = model(ids[:, :-1]).flatten(0, 1)
        total += F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
        tokens += len(logits)
    return total / tokens


def step_flops(dense: nn.Module, schedule: Schedule, report: Any = None) -> float:
    """FLOPs of a training step: three times those of a forward pass. ``report`` is that of a conversion of the model.
    What operators compute a second time in a backward pass to save memory is not counted.
    """
    ids = torch.zeros(1, schedule.sequence, dtype=torch.int64, device=next(dense.parameters()).device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        dense.eval()(ids)
    tokens = schedule.batch * schedule.sequence
    blocks = report.blocks if report else ()
    added = sum(block.flops_per_token_after - block.flops_per_token_before for block in blocks)
    return 3 * tokens * (counter.get_total_flops() / schedule.sequence + added)


def _now(corpus: Corpus) -> float:
    """Seconds, when the device has done what it was given."""
    if corpus.train.is_cuda:
        torch.cuda.synchronize(corpus.train.device)
    return time.perf_counter()
