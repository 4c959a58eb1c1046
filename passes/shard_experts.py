"""Experts over ranks: an exchange before them and one after, and each rank with its own part of their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import BadOption, NotDivisible, Refused
from moeify.ir import exchange_nodes
from moeify.ir.emit import Emitter, fake_result
from moeify.ir.expert_calls import ExpertCall, expert_calls, tag_untagged
from moeify.ir.metadata import tag
from moeify.ir.no_expert import fill_slots
from moeify.ir.program import Program
from moeify.ir.shape_check import check_shapes
from moeify.ir.sharding import KEY, MODES, ShardedBlock, Sharding, capacity, cut, fitting_ranks, sharding, share
from moeify.passes.lower_experts import LowerExperts
from moeify.pipeline.base import Log, Pass


@dataclass(frozen=True)
class ShardExperts(Pass):
    """Spread every mixture's experts over ``ranks`` ranks (expert parallelism). Routers and shared experts stay whole.

    Before:  rows, counts, order = moe.permute(x_TD, experts_TK, E)
             y_TD = moe.unpermute(moe.experts(rows, counts, up_EFD, ...), order, weights_TK)
    After:   rows, counts, order = moe.permute(x_TD, experts_TK, E)
             received_WL = moe.all_to_all_even(counts_WL)
             there = moe.transpose_groups(moe.all_to_all_rows(rows), received_WL)
             h = moe.experts(there, moe.local_counts(received_WL), up_LFD, ...)
             back = moe.all_to_all_rows(moe.transpose_groups(h, received_LW))
             y_TD = moe.unpermute(back, order, weights_TK)

    ``dropless`` moves every row and computes what one process computes. ``capacity`` sends buffers of one size,
    ``factor * tokens * K / E`` rows from each rank to each expert, rounded up (Lepikhin et al. 2020, "GShard"); a row
    that finds its buffer full is dropped: its expert adds nothing to its token. ``tokens`` is per rank and call, 0 for
    those of the example input; the buffers are part of the graph, so that ranks with other numbers of tokens still fit
    together.

    ``rank`` says whose weights stay here: stacked weights become recipes of that rank's experts. The graph does not
    depend on it. Weights that several calls share are cut once. ``check`` runs the result over its shapes alone, which
    are the same for every rank.

    Raises NotDivisible in capacity mode for a block whose experts the ranks do not divide, Refused for a program
    without experts, one that is sharded already, or one whose graph cannot take rows of another number.
    """

    name: ClassVar[str] = "shard-experts"

    ranks: int = 1
    rank: int = 0
    mode: str = "dropless"
    factor: float = 1.25
    tokens: int = 0
    check: bool = True

    def apply(self, program: Program, log: Log) -> None:
        self.rewrite(program, log)
        if self.check:
            check_shapes(program)

    def rewrite(self, program: Program, log: Log) -> None:
        """All but the check."""
        self._check(program)
        tag_untagged(program)
        fill_slots(program)  # ranks exchange whole sets of rows
        LowerExperts().apply(program, Log())
        calls = expert_calls(program.graph)
        if not calls:
            raise Refused("the program has no experts to shard", hint="convert it first: moeify convert")
        blocks = _blocks(calls)
        if self.mode == "capacity":
            for block in blocks.values():
                self._check_even(block)
        for block in blocks.values():
            start, stop = share(block.experts, self.ranks, self.rank)
            for name in block.parameters:
                _only_experts_read(program, calls, name, block.block)
                cut(program, name, start, stop)
            log(f"{block.block}: {block.experts} experts over {self.ranks} ranks, {start} to {stop} here")
        _retype_weights(program, calls)
        for call in calls:
            self._exchange(program, call, log)
        program.graph_module.recompile()
        program.provenance[KEY] = Sharding(self.ranks, self.rank, self.mode, tuple(blocks.values()))

    def _check(self, program: Program) -> None:
        if self.ranks < 1 or not 0 <= self.rank < self.ranks:
            raise BadOption(f"shard-experts: there is no rank {self.rank} of {self.ranks}")
        if self.mode not in MODES:
            raise BadOption(f"shard-experts: there is no mode {self.mode!r}", hint=f"choose {' or '.join(MODES)}")
        if self.factor <= 0 or self.tokens < 0:
            what = f"factor {self.factor} must be positive and tokens {self.tokens} not negative"
            raise BadOption(f"shard-experts: {what}", hint="tokens=0 means those of the example input")
        done = sharding(program)
        if done is not None:
            raise Refused(f"the program is sharded over {done.ranks} ranks already", hint="start from the whole one")

    def _check_even(self, block: ShardedBlock) -> None:
        if block.experts % self.ranks:
            fits = ", ".join(map(str, fitting_ranks(block.experts)))
            raise NotDivisible(
                f"{block.experts} experts do not split evenly over {self.ranks} ranks, which capacity mode needs",
                where=block.block,
                hint=f"choose one of {fits} ranks, or mode=dropless",
            )

    def _exchange(self, program: Program, call: ExpertCall, log: Log) -> None:
        first = call.inside[0]
        for weight in call.weights:
            if first < weight:  # a weight that an earlier call shares stands before both
                first.prepend(weight)
        mark = tag(call.unpermute)
        assert mark is not None, f"{call.unpermute.name} has no tag"
        emit = Emitter(program, first, mark.block, mark.call, call.unpermute)
        if self.mode == "dropless":
            there = exchange_nodes.dropless(emit, call, self.ranks)
        else:
            size = capacity(self._rows(call), call.num_experts, self.factor)
            there = exchange_nodes.with_capacity(emit, call, self.ranks, size)
            log(f"{call.block}: buffers of {size} rows from each rank to each expert")
        moved = {call.rows: there.rows, call.counts: there.counts}
        for node in call.inside:
            for old, new in moved.items():
                node.replace_input_with(old, new)
            node.meta["val"] = fake_result(program, node, emit.example.fake_mode)
        emit = Emitter(program, call.unpermute, mark.block, mark.call, call.unpermute)
        out = call.unpermute.args[0]
        assert isinstance(out, torch.fx.Node)
        call.unpermute.update_arg(0, there.back(emit, out))

    def _rows(self, call: ExpertCall) -> int:
        """Of one rank in one call."""
        if self.tokens:
            return self.tokens * call.top_k
        size = call.rows.meta["val"].shape[0]
        return size if isinstance(size, int) else int(size.node.hint)


def _blocks(calls: list[ExpertCall]) -> dict[str, ShardedBlock]:
    found: dict[str, ShardedBlock] = {}
    for call in calls:
        names = tuple(str(weight.target) for weight in call.weights)
        found.setdefault(call.block, ShardedBlock(call.block, call.num_experts, call.width, call.top_k, names))
    return found


def _only_experts_read(program: Program, calls: list[ExpertCall], name: str, block: str) -> None:
    inside = {node for call in calls for node in call.inside}
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == name and any(user not in inside for user in node.users):
            raise Refused(f"{name} is read outside of its experts, so that it cannot be cut", where=block)


def _retype_weights(program: Program, calls: list[ExpertCall]) -> None:
    for call in calls:
        for weight in call.weights:
            value = weight.meta["val"]
            with value.fake_mode:
                shape = program.parameter(str(weight.target)).shape
                weight.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
