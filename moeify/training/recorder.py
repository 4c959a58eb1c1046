"""Recording what routers do while a model runs, in training or evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify.errors import UsageError
from moeify.nn.observation import attach
from moeify.nn.observed import Observation
from moeify.training.blocks import facts_of, unwrapped
from moeify.training.information import contingency, entropy, information, information_by_chance
from moeify.training.losses import by_block
from moeify.training.routing_report import MOST_CLASSES, BlockRouting, RoutingReport
from moeify.training.watch import Masks, find, merged, recomputing
from moeify.verify.fidelity import ExpertLoad


@contextmanager
def routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Record what the routers of a converted model do, until the end of the block.

        with moeify.routing(model) as seen:
            for batch in data:
                seen.next(mask=batch["attention_mask"])
                model(**batch)
        print(seen.report().blocks[0].entropy)

    Sums are kept, no tokens. Raises UsageError for a model without routers, Refused for a graph whose routers cannot be
    told any more.
    """
    model = unwrapped(model)
    watch = find(model)
    facts = facts_of(model) if watch is None else watch.facts
    recorder = RoutingRecorder({block: one.path for block, one in facts.items()})
    hook = model.register_forward_hook(recorder.end)
    detach = None
    try:
        if watch is None:
            detach = attach(model, recorder.keep)
        else:
            watch.listeners.append(recorder.keep)
        yield recorder
    finally:
        hook.remove()
        if detach is not None:
            detach()
        elif watch is not None:
            watch.listeners.remove(recorder.keep)


class RoutingRecorder:
    """Adds up what routers do, a forward pass at a time."""

    def __init__(self, paths: dict[str, str]) -> None:
        self._paths = paths
        self._blocks: dict[str, _Sums] = {}
        self._pairs: dict[tuple[str, str], Tensor] = {}  # [E, E] tokens by expert here and expert there
        self._calls: list[Observation] = []
        self._mask: Masks = None
        self._labels: Masks = None

    def next(self, *, mask: Masks = None, labels: Masks = None) -> None:
        """Of the tokens of the next forward pass: which count, as in ``losses``, and the class of each, an integer of
        at least 0, negative for none.

        ``labels`` are of as many tokens as a block sees, or [batch], one for each example: then the block's tokens are
        those of the first example, then those of the second. A mapping from block paths has labels for some blocks.
        """
        self._mask, self._labels = mask, labels

    def keep(self, call: Observation) -> None:
        """Take note of a router's call."""
        if not recomputing():
            values = {name: call.values[name].detach() for name in ("experts", "weights")}
            self._calls.append(Observation(call.block, call.router, values, call.training))

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the whole model: add the pass up."""
        calls, self._calls = self._calls, []
        mask, self._mask = self._mask, None
        labels, self._labels = self._labels, None
        firsts: dict[str, Tensor] = {}
        for block, mine in by_block(calls).items():
            path = self._paths.get(block, block)
            each = [dict(call.values) for call in mine]
            mine_labels = labels.get(path) if isinstance(labels, Mapping) else labels
            if mine_labels is not None:
                each = [{**one, "labels": _fitting(mine_labels, one["experts"], path)} for one in each]
            values = merged(each, mask.get(path) if isinstance(mask, Mapping) else mask, path)
            sums = self._blocks.setdefault(block, _Sums(path, mine[0].router.num_experts))
            firsts[block] = sums.add(values)
        names = list(firsts)
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                if len(firsts[one]) == len(firsts[other]):
                    sizes = self._blocks[one].experts, self._blocks[other].experts
                    table = contingency(firsts[one], firsts[other].to(firsts[one].device), *sizes)
                    self._pairs[one, other] = self._pairs.get((one, other), 0) + table

    @property
    def tokens(self) -> int:
        """Those that the block with the most has seen."""
        return max((sums.tokens for sums in self._blocks.values()), default=0)

    def report(self) -> RoutingReport:
        """The figures of all forward passes so far. Raises UsageError where there was none, or none with tokens."""
        blocks = [sums for sums in self._blocks.values() if sums.slots]
        if not blocks:
            raise UsageError("no router has chosen an expert for a token", hint="run the model inside the with block")
        names = [name for name, sums in self._blocks.items() if sums.slots]
        agreement = [[self._agreement(one, other) for other in names] for one in names]
        return RoutingReport([sums.figures() for sums in blocks], agreement)

    def _agreement(self, one: str, other: str) -> float | None:
        if one == other:
            first_E = self._blocks[one].firsts_E
            return 1.0 if entropy(first_E) > 0 else 0.0
        table = self._pairs.get((one, other), self._pairs.get((other, one)))
        if table is None or not table.sum():
            return None
        entropies = entropy(table.sum(0)) + entropy(table.sum(1))
        return 2 * information(table) / entropies if entropies else 0.0


@dataclass
class _Sums:
    """Of one block."""

    path: str
    experts: int

    def __post_init__(self) -> None:
        self.load = ExpertLoad(self.experts)
        self.tokens = self.slots = self.dropped = 0
        self.firsts_E = torch.zeros(self.experts, dtype=torch.float64)
        self.classes = torch.zeros(0, dtype=torch.int64)  # the labels that were seen, in order
        self.labels_EC = torch.zeros(self.experts, 0, dtype=torch.float64)

    def add(self, values: dict[str, Tensor]) -> Tensor:
        """Gives the expert [T] of each token, number E for none."""
        experts_TK, weights_TK = values["experts"], values["weights"]
        chosen_TK = experts_TK < self.experts
        self.load.add(experts_TK)
        self.tokens += len(experts_TK)
        self.slots += int(chosen_TK.sum())
        self.dropped += int((chosen_TK & (weights_TK == 0)).sum())
        first_T = experts_TK.gather(1, weights_TK.argmax(1, keepdim=True)).squeeze(1)
        self.firsts_E += torch.bincount(first_T, minlength=self.experts)[: self.experts].cpu()
        if "labels" in values:
            self._add_labels(first_T, values["labels"])
        return first_T

    def _add_labels(self, first_T: Tensor, labels_T: Tensor) -> None:
        known = labels_T >= 0
        first_T, labels_T = first_T[known].cpu(), labels_T[known].cpu().long()
        classes = torch.cat([self.classes, labels_T]).unique()
        grown = torch.zeros(self.experts, len(classes), dtype=torch.float64)
        grown[:, torch.searchsorted(classes, self.classes)] = self.labels_EC
        places_T = torch.searchsorted(classes, labels_T)
        self.classes = classes
        self.labels_EC = grown + contingency(first_T, places_T, self.experts, len(classes))

    def figures(self) -> BlockRouting:
        return BlockRouting(
            self.path,
            self.tokens,
            self.load.share,
            self.load.entropy,
            self.load.variation,
            self.load.peak,
            self.slots / self.tokens,
            self.dropped / self.slots,
            **self._told(),
        )

    def _told(self) -> dict[str, Any]:
        """What the expert of a token tells of its label, by field; nothing without labels."""
        seen = self.labels_EC.sum(0) > 0
        if not seen.any():
            return {}
        counts_EC, classes = self.labels_EC[:, seen], self.classes[seen].tolist()
        nats, of_labels = information(counts_EC), entropy(counts_EC.sum(0))
        shares_CE = (counts_EC / counts_EC.sum(0)).T.tolist()
        return {
            "label_information": nats / of_labels if of_labels else 0.0,
            "mutual_information": nats,
            "mutual_information_by_chance": information_by_chance(counts_EC),
            "label_loads": dict(zip(classes, shares_CE)) if len(classes) <= MOST_CLASSES else None,
        }


def _fitting(labels: Tensor, experts_TK: Tensor, path: str) -> Tensor:
    tokens = len(experts_TK)
    if labels.dim() == 1 and len(labels) and tokens % len(labels) == 0:
        labels = labels.repeat_interleave(tokens // len(labels))
    if labels.numel() != tokens:
        raise UsageError(f"the labels are of {labels.numel()} tokens, and the block's router saw {tokens}", where=path)
    return labels.flatten().to(experts_TK.device)
