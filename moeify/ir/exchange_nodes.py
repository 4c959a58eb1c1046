"""The nodes of an exchange: rows to the ranks that hold their experts, and back.

Letters: T tokens, K chosen, R = T * K rows, E experts, W ranks, L = ceil(E / W) experts of the fullest rank, C rows of
a buffer, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from moeify.ir.devices import STAYS
from moeify.ir.emit import Emitter
from moeify.ir.expert_calls import ExpertCall
from moeify.ir.roles import EXPERTS
from moeify.ir.sharding import most

_aten = torch.ops.aten
_moe = torch.ops.moeify
_ROLE = "dispatch"


@dataclass(frozen=True)
class There:
    """Rows on the rank of their experts, sorted by them; ``back`` takes the experts' output to the sorted rows of the
    rank that sent them."""

    rows: fx.Node
    counts: fx.Node
    back: Callable[[Emitter, fx.Node], fx.Node]


def dropless(emit: Emitter, call: ExpertCall, ranks: int) -> There:
    """Every row goes. The ranks tell each other first how many are coming."""
    local = most(call.num_experts, ranks)
    counts_E = call.counts
    if local * ranks != call.num_experts:
        counts_E = emit.call(_ROLE, _aten.constant_pad_nd.default, counts_E, [0, local * ranks - call.num_experts])
    sent_WL = emit.call(_ROLE, _aten.view.default, counts_E, [ranks, local])
    received_WL = emit.call(_ROLE, _moe.all_to_all_even.default, sent_WL, EXPERTS, ranks, call.block)
    sums = [emit.call(_ROLE, _aten.sum.dim_IntList, counts, [1]) for counts in (received_WL, sent_WL)]
    # One copy to the CPU instead of a wait for the device in each exchange.
    both_2W = emit.call(_ROLE, _aten.stack.default, sums)
    both_2W = emit.call(_ROLE, _aten._to_copy.default, both_2W, device=torch.device("cpu"))
    both_2W.meta[STAYS] = True
    out_W, in_W = (emit.call(_ROLE, _aten.select.int, both_2W, 0, i) for i in range(2))
    arriving = emit.call(_ROLE, _aten.item.default, emit.call(_ROLE, _aten.sum.default, out_W))
    rows = emit.call(_ROLE, _moe.all_to_all_rows.default, call.rows, out_W, in_W, arriving, EXPERTS, ranks, call.block)
    rows = emit.call(_ROLE, _moe.transpose_groups.default, rows, received_WL)
    counts_L = emit.call(_ROLE, _moe.local_counts.default, received_WL, call.weights[0])

    def back(emit: Emitter, out: fx.Node) -> fx.Node:
        received_LW = emit.call(_ROLE, _aten.t.default, received_WL)
        out = emit.call(_ROLE, _moe.transpose_groups.default, out, received_LW)
        R = size(emit, call.rows, 0)
        return emit.call(_ROLE, _moe.all_to_all_rows.default, out, in_W, out_W, R, EXPERTS, ranks, call.block)

    return There(rows, counts_L, back)


def with_capacity(emit: Emitter, call: ExpertCall, ranks: int, capacity: int) -> There:
    """The first ``capacity`` rows of each expert go, in buffers of one size; the others' result is zero."""
    local, C, D = call.num_experts // ranks, capacity, call.width
    sent = emit.call(_ROLE, _moe.pad_groups.default, call.rows, call.counts, C)
    there = _swap(emit, sent, (ranks, local, C, D), call.block, first=True)
    rows = emit.call(_ROLE, _aten.view.default, there, [local * ranks * C, D])
    device = call.counts.meta["val"].device
    counts_L = emit.call(
        _ROLE, _aten.full.default, [local], ranks * C, dtype=torch.int64, device=device, pin_memory=False
    )

    def back(emit: Emitter, out: fx.Node) -> fx.Node:
        width = out.meta["val"].shape[1]
        out = emit.call(_ROLE, _aten.view.default, out, [local, ranks, C, width])
        out = _swap(emit, out, (ranks, local, C, width), call.block, first=False)
        out = emit.call(_ROLE, _aten.view.default, out, [ranks * local, C, width])
        return emit.call(_ROLE, _moe.unpad_groups.default, out, call.counts, size(emit, call.rows, 0))

    return There(rows, counts_L, back)


def _swap(emit: Emitter, x: fx.Node, sizes: tuple[int, int, int, int], block: str, *, first: bool) -> fx.Node:
    """[W, L, C, D] through the exchange to [L, W, C, D] (``first``), or from there back."""
    if first:
        x = emit.call(_ROLE, _aten.view.default, x, list(sizes))
        x = emit.call(_ROLE, _moe.all_to_all_even.default, x, EXPERTS, sizes[0], block)
    x = emit.call(_ROLE, _aten.permute.default, x, [1, 0, 2, 3])
    x = emit.call(_ROLE, _aten.clone.default, x, memory_format=torch.contiguous_format)
    return x if first else emit.call(_ROLE, _moe.all_to_all_even.default, x, EXPERTS, sizes[0], block)


def size(emit: Emitter, x: fx.Node, dim: int) -> int | fx.Node:
    """A size as a number, or as a node that reads it."""
    value = x.meta["val"].shape[dim]
    return value if isinstance(value, int) else emit.call(_ROLE, _aten.sym_size.int, x, dim)
