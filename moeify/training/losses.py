"""The router losses of a model after a forward pass, by name and in all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.errors import Refused, UsageError
from moeify.nn.losses.base import Routed, RouterLoss, Total, here
from moeify.nn.observed import Observation
from moeify.training.blocks import BlockFacts, parsed, unwrapped
from moeify.training.ranks import Group, total_over
from moeify.training.watch import Masks, merged, watch_of

Which = str | RouterLoss | Sequence[str | RouterLoss] | None


@dataclass(frozen=True)
class RouterLosses(Mapping[str, Tensor]):
    """By the name of a loss: its weighted value, summed over the blocks. ``total`` is their sum, with autograd.

    ``blocks`` has each block's weighted values, by module path and name.
    """

    blocks: Mapping[str, Mapping[str, Tensor]]

    @property
    def total(self) -> Tensor:
        return _sum([value for block in self.blocks.values() for value in block.values()])

    def __getitem__(self, name: str) -> Tensor:
        found = [block[name] for block in self.blocks.values() if name in block]
        if not found:
            raise KeyError(name)
        return _sum(found)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for block in self.blocks.values() for name in block))

    def __len__(self) -> int:
        return len(list(iter(self)))


def losses(
    model: nn.Module,
    which: Which = None,
    *,
    mask: Masks = None,
    reward: Tensor | None = None,
    group: Group | None = None,
) -> RouterLosses:
    """The router losses of the last forward pass in training mode, weighted, to be added to the model's own loss.

    ``which`` are texts such as ``switch{weight=0.01}``, for all blocks; without it, those of the model's recipe.
    ``mask`` has a number for each token, 0 for one that does not count, such as an attention_mask [batch, sequence];
    one number for all tokens; or a mapping from block paths to masks, where blocks see different tokens. ``reward`` has
    a number for each token, what ``reinforce`` learns from. Several calls of a block in a forward count as one.

    With a ``group``, a torch.distributed process group whose ranks hold the same routers and average their gradients
    (DistributedDataParallel), sums over tokens are over all its ranks: value and averaged gradient are those of one
    process on all tokens. Every rank of the group must call it.

    Raises UsageError for a model without routers, one that is not observed or has not run in training mode, and where
    no loss is named; Refused for a loss whose values a router does not have.
    """
    return over_ranks(model, which, mask, reward, here if group is None else total_over(group))


def over_ranks(model: nn.Module, which: Which, mask: Masks, reward: Tensor | None, total: Total) -> RouterLosses:
    """``losses`` with any sum over ranks."""
    watch = watch_of(unwrapped(model))
    facts, factors, calls = watch.facts, watch.factors, watch.read()
    watch.mask = mask
    given = None if which is None else parsed([which] if isinstance(which, (str, RouterLoss)) else which)
    found: dict[str, dict[str, Tensor]] = {}
    for block, mine in by_block(calls).items():
        wanted = facts[block].losses if given is None else given
        if not wanted:
            continue
        watch.asked[block] = wanted
        routed = routed_of(mine, facts[block], mask, reward, total)
        values = found.setdefault(facts[block].path, {})
        for loss in wanted:
            _check(loss, mine[0], facts[block], reward, total)
            value = loss.of(routed) * (loss.weight * factors.get(str(loss), loss.first_factor))
            values[loss.name] = values[loss.name] + value if loss.name in values else value
    if not found:
        raise UsageError(
            "no router loss is named, neither here nor in the model's recipe",
            hint="moeify.losses(model, ['switch', 'z']); 'moeify losses' lists them",
        )
    return RouterLosses(found)


def routed_of(
    calls: Sequence[Observation], facts: BlockFacts, mask: Masks, reward: Tensor | None, total: Total
) -> Routed:
    """What a block's router did in all its calls of a forward."""
    mine = mask.get(facts.path) if isinstance(mask, Mapping) else mask
    paid = None
    if reward is not None:
        each = [{"experts": call.values["experts"], "reward": _per_token(reward, call, facts)} for call in calls]
        paid = merged(each, mine, facts.path)["reward"]
    return Routed(merged([call.values for call in calls], mine, facts.path), calls[0].router.num_experts, paid, total)


def by_block(calls: Sequence[Observation]) -> dict[str, list[Observation]]:
    """In the order of the first call of each."""
    found: dict[str, list[Observation]] = {}
    for call in calls:
        found.setdefault(call.block, []).append(call)
    return found


def _check(loss: RouterLoss, call: Observation, facts: BlockFacts, reward: Tensor | None, total: Total) -> None:
    name = getattr(getattr(call.router, "spec", None), "name", type(call.router).__name__)
    lacking = [value for value in loss.reads if value not in call.values]
    if lacking:
        raise Refused(
            f"the {loss.name} loss needs the {' and '.join(lacking)} of a router, and {name} has none",
            where=facts.path,
            hint=_HINTS.get(loss.name, "choose another loss for this block"),
        )
    if loss.over_pairs and total is not here:
        raise Refused(
            f"the {loss.name} loss looks at pairs of tokens, and they are spread over ranks",
            where=facts.path,
            hint="train in one process, or choose another loss",
        )
    if loss.needs_reward and reward is None:
        raise UsageError(
            f"the {loss.name} loss needs a reward for each token",
            where=facts.path,
            hint="moeify.losses(model, reward=...), for example minus the loss of each token",
        )


_HINTS = {"load": "the noisy-topk router has noise", "reinforce": "the rl router has a baseline"}


def _per_token(reward: Tensor, call: Observation, facts: BlockFacts) -> Tensor:
    tokens = len(call.values["experts"])
    if reward.numel() not in (1, tokens):
        raise UsageError(
            f"the reward is of {reward.numel()} tokens, and the block's router saw {tokens}", where=facts.path
        )
    return reward.flatten().expand(tokens).to(call.values["experts"].device)


def _sum(values: Sequence[Tensor]) -> Tensor:
    """On the device of the first: the blocks of a model may be on several."""
    return torch.stack([value.to(values[0].device) for value in values]).sum()
