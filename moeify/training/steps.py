"""What no gradient changes: routers' biases and losses' coefficients, updated after an optimiser's step."""

from __future__ import annotations

import torch
from torch import nn

from moeify.nn.losses.base import Routed, RouterLoss, Total, here
from moeify.training.blocks import facts_of, unwrapped
from moeify.training.losses import by_block, routed_of
from moeify.training.ranks import Group, total_over
from moeify.training.watch import Masks, find, watch_of


def after_step(
    model: nn.Module,
    *,
    mask: Masks = None,
    group: Group | None = None,
) -> None:
    """Call it after each ``optimizer.step()``: routers and losses change what no gradient changes, by what the last
    forward pass in training mode has shown.

    The sigmoid-bias router moves its biases, the l1 loss, where ``losses`` has given it, its coefficient. ``mask`` is
    as in ``losses``, by default the one that it was given for the same forward pass. With a ``group``, loads are those
    of all its ranks, so that they make the same update. A model without anything to update is left alone. With
    gradients accumulated over several forward passes, the last one counts.

    Raises UsageError for a model without routers, or where there is something to update and nothing was observed.
    """
    after(unwrapped(model), mask, here if group is None else total_over(group))


@torch.no_grad()
def after(model: nn.Module, mask: Masks, total: Total) -> None:
    """``after_step`` with any sum over ranks."""
    watch = find(model)
    facts = facts_of(model) if watch is None else watch.facts
    adapting = watch is not None and any(loss.adapts for losses in watch.asked.values() for loss in losses)
    if facts and not adapting and not any(one.updates for one in facts.values()):
        return
    watch = watch_of(model)
    seen: dict[RouterLoss, list[Routed]] = {}
    for block, calls in by_block(watch.read()).items():
        routed = routed_of(calls, facts[block], watch.mask if mask is None else mask, None, total)
        if facts[block].updates:
            calls[0].router.after_step(routed.values, total)
        for loss in watch.asked.get(block, ()):
            if loss.adapts:
                seen.setdefault(loss, []).append(routed)
    for loss, blocks in seen.items():
        watch.factors[str(loss)] = loss.next_factor(watch.factors.get(str(loss), loss.first_factor), blocks)
