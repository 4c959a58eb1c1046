"""Which parameters of a router belong to single experts, so that they can be reordered with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from moeify.ir.program import Program

_aten = torch.ops.aten
_moe = torch.ops.moeify

# These treat all experts alike: pointwise over [T, E] scores, along the whole last axis of them, or on the numbers of
# chosen experts without reading anything into a number but equality and the order of equal ones. No activation is
# here: where one is flat (a ReLU that no unit passes), scores tie whose rows differ, and the order would decide.
_ALIKE = frozenset(
    {
        _aten.softmax.int, _aten.sigmoid.default, _aten.softplus.default, _aten.add.Tensor, _aten.mul.Tensor,
        _aten.div.Tensor, _aten.to.dtype, _aten.sort.stable, _aten.argmax.default, _aten.gather.default,
        _aten.full_like.default, _aten.ones_like.default, _aten.zeros_like.default, _aten.sum.default,
        _aten.ceil.default, _aten.lt.Tensor, _aten.sub.Tensor, _aten.cumsum.default, _aten.searchsorted.Tensor,
        _aten.scatter.src, _aten.squeeze.dim, _aten.unsqueeze.default, _aten._assert_tensor_metadata.default,
        _aten.masked_fill.Scalar, _aten.logical_not.default, _aten.ge.Tensor, _aten.minimum.default,
        _moe.normal_like.default, _moe.jitter_like.default, _moe.gumbel_like.default,
    }
)  # fmt: skip
_ENDS = frozenset({_moe.permute.default, _moe.unpermute.default, _moe.dispatch_ffn.default})


@dataclass(frozen=True)
class RouterRows:
    """Names of parameters with a row per expert (weights [E, D], biases [E]), and of tables whose values are numbers
    of experts.
    """

    by_row: tuple[str, ...]
    by_value: tuple[str, ...]

    def equal(self, program: Program) -> list[list[int]]:
        """Experts whose rows are bit for bit alike, and so always have equal scores; classes of two or more."""
        if not self.by_row:
            return []
        values = [_value(program, name).detach().double() for name in self.by_row]
        rows = torch.cat([value.reshape(len(value), -1) for value in values], dim=1)
        _, number = torch.unique(rows, dim=0, return_inverse=True)
        classes: dict[int, list[int]] = {}
        for expert, of in enumerate(number.tolist()):
            classes.setdefault(of, []).append(expert)
        return [members for members in classes.values() if len(members) > 1]


def router_rows(program: Program, block: str, chosen: Sequence[tuple[object, int]]) -> RouterRows | str:
    """The parameters of a block's router, or why they cannot be reordered.

    ``chosen`` holds, for each call of the block, the node of the experts chosen [T, K] and their number E.
    """
    prefix = f"{block}.router."
    reads = [n for n in program.graph.nodes if n.op == "get_attr" and str(n.target).startswith(prefix) and n.users]
    if not reads:
        return "it has no parameters of its own"
    by_row: dict[str, None] = {}
    by_value: dict[str, None] = {}
    starts: set[fx.Node] = set()
    results = {node for node, _ in chosen}
    experts = chosen[0][1]
    for read in reads:
        value = program.parameter(str(read.target))
        for user in read.users:
            if user.target == _aten.linear.default and read in user.args[1:]:
                if value.shape[0] != experts:
                    return f"{read.target} has {value.shape[0]} rows for {experts} experts"
                by_row[str(read.target)] = None
            elif user.target == _aten.index_select.default and user.args[0] is read and user in results:
                by_value[str(read.target)] = None
            else:
                return f"{read.target} is read by {user.target}"
            starts.add(user)
    reason = _not_alike(starts)
    if reason is None and not all(_depends(node, starts) for node in results):
        reason = "a call does not choose by these parameters"
    return reason or RouterRows(tuple(by_row), tuple(by_value))


def _value(program: Program, name: str) -> torch.Tensor:
    recipe = program.pending.get(name)
    return program.parameter(name) if recipe is None else recipe.materialise(program.parameter)


def _not_alike(starts: set[fx.Node]) -> str | None:
    """What stands between the scores and the dispatch that knows one expert from another."""
    left, seen = list(starts), set(starts)
    while left:
        node = left.pop()
        for user in node.users:
            if user in seen or user.target in _ENDS:
                continue
            if not (user.target in _ALIKE or _is_result(user) or _is_first_of_sorted(user)):
                return f"{user.target} stands between its scores and its choice"
            outside = [s for s in user.all_input_nodes if s.op == "get_attr" and s.meta["val"].dim()]
            if outside:
                return f"{outside[0].target} takes part in its choice"
            seen.add(user)
            left.append(user)
    return None


def _is_result(node: fx.Node) -> bool:
    return node.target == torch.ops.aten.sym_size.int or getattr(node.target, "__name__", "") == "getitem"


def _is_first_of_sorted(node: fx.Node) -> bool:
    """The first k of sorted scores; a slice of anything else takes some experts by their numbers."""
    if node.target != _aten.slice.Tensor:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return _is_result(source) and source.args[0].target == _aten.sort.stable  # type: ignore[union-attr]


def _depends(node: object, starts: set[fx.Node]) -> bool:
    left, seen = [node], set()
    while left:
        one = left.pop()
        if one in starts:
            return True
        if isinstance(one, fx.Node) and one not in seen:
            seen.add(one)
            left.extend(one.all_input_nodes)
    return False
