"""Following axes through reshapes and permutations."""

from __future__ import annotations

from torch import fx

from moeify.match.ops import arguments, name_of


class MixesRows(Exception):
    """The reason why rows do not stay apart, in one line."""


def regroup(sizes: tuple[int, ...], dims: tuple[int, ...], out: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Which axes of a reshaped tensor hold features: axes are matched in the smallest groups of equal product."""
    found: list[int] = []
    i = j = 0
    while i < len(sizes) and j < len(out):
        before, after, p, q = [i], [j], sizes[i], out[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                p *= sizes[i]
                before.append(i)
                i += 1
            else:
                q *= out[j]
                after.append(j)
                j += 1
        features = [k for k in before if k in dims]
        rows = [k for k in before if k not in dims and sizes[k] != 1]
        if rows and any(sizes[k] != 1 for k in features):
            raise MixesRows(f"{name} merges rows with features")
        if features and not rows:
            found.extend(after)
    return tuple(found)


def reordering(node: fx.Node, rank: int) -> list[int]:
    """The permutation that a reordering operator applies: result axis -> operand axis."""
    name, order = name_of(node), list(range(rank))
    if name in ("t", "numpy_T"):
        return order[::-1]
    if name == "permute":
        return [d % rank for d in arguments(node)[1]]
    if name == "movedim":
        as_list = [[a] if isinstance(a, int) else list(a) for a in arguments(node)[1:3]]
        source, target = [d % rank for d in as_list[0]], [d % rank for d in as_list[1]]
        rest = [d for d in order if d not in source]
        places = dict(zip(target, source))
        return [places[d] if d in places else rest.pop(0) for d in order]
    i, j = (rank - 2, rank - 1) if name == "mT" else (arguments(node)[1] % rank, arguments(node)[2] % rank)
    order[i], order[j] = order[j], order[i]
    return order
